"""Imported last by the server that test ranks fork from. Keeps imported objects out of garbage
collection: a collection would copy their memory into every rank."""

import gc

gc.freeze()
