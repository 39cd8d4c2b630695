"""Formats of data, one module each: those that shards are read in (in_place/), and those that are imported into shards
(records/).  A module that is added there is one more format, without an edit elsewhere.
"""
