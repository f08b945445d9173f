"""Layouts: how a part's images and table become keys in a store. What one promises: `base`."""

from __future__ import annotations

from renderfarm.layouts import files, parquet, webdataset
from renderfarm.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {"files": files, "parquet": parquet, "webdataset": webdataset}
