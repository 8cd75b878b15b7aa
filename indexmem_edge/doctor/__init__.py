"""Does this machine run the library, and the model?"""
