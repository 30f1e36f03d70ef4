"""Score archives of images into Parquet, resumable, with one process or many."""

from msflow_ext.inference.archive.job import Archive, Job, Shard, prepare, score_shard

__all__ = ["Archive", "Job", "Shard", "prepare", "score_shard"]
