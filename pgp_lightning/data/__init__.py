"""Data: manifests, shards, and an exactly resumable stream over them."""

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.records import SampleBuilder
from pgp_lightning.data.shards import verify_source
from pgp_lightning.data.writing import write_source

__all__ = ["Batch", "Manifest", "SampleBuilder", "verify_source", "write_source"]
