"""Layouts: how a part's images and table become keys in a store. `files` is one folder per part."""
