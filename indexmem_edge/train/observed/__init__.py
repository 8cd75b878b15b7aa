"""A model that the native library computes, observed while it does: any architecture, any quantisation, any device."""
