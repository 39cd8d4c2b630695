"""Import: records of JSON files, tables, parquet files, folders and compressed tars become shards.

    sources -> files -> units (pipeline) -> parts, each a tar with its index and a journal entry (unit, in parallel)

A part is a pure function of its unit, and a unit of its file; what a killed import left behind is written again alike.
"""
