"""WebDataset tars, their indexes and catalogs, on disks and in object stores."""
