"""Imported last by the server that ranks fork from: their garbage collections need not go through
all that was imported, which would also copy its memory into every rank."""

import gc

gc.freeze()
