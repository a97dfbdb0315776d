"""The kinds of places that hold a store's objects: a directory, S3, Google Cloud Storage, Azure Blob Storage."""
