"""Engines: who runs workers, and where. The driver sees only the protocol in `base`."""
