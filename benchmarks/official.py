"""The authors' way lives in the package now, because `msflow bench` compares with it too."""

from msflow_ext.bench.official import OfficialMSFlow

__all__ = ["OfficialMSFlow"]
