"""How good is an indexer? Against an oracle and the policies."""
