"""Curation: which samples of raw shards are worth training on, decided before anything is indexed.

    shard -> examine (in parallel): damage, URL, text, size, pixels, similarity -> duplicates (one place, shard order)
          -> write (in parallel): new shards, and a table of what was dropped and why

The filters are those of the Seed1.5-VL report, section 3.1.1: similarity of image and text, size and aspect ratio of
images, length of text, duplicates, URLs.  samples reads a tar; filters and similar judge one sample; duplicates
remembers what was kept; pipeline joins them; runners spread shards over processes or over Ray; report counts.
"""
