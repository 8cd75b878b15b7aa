"""All ctypes: the library is found, loaded and called here."""
