"""The Hugging Face Hub on loopback, for tests and for trying commands offline; the standard library only.

It speaks the protocol of the unpatched ``huggingface_hub`` client (1.33 to 2.4) with ``HF_HUB_DISABLE_XET=1``: repositories,
branches, tags, pull requests, commits, LFS, trees, downloads with ranges, cards. In a test::

    with HubServer(tmp_path / "hub") as server:
        gate = server.faults.hold("PUT", "/storage/", after=65536)
        ...  # a client with server.environment() in a fresh process
        assert server.files("me/x")["model.safetensors"] == weights
        assert not server.leaks

By hand: ``python -m tests.hub_server --port 8765 --root DIR``.

Where the real Hub differs: no Xet, no multi-part upload, no git over HTTP, no gated repositories, no moves and renames, no
merging of pull requests and no comments, ``.gitignore`` is not applied, the initial commit and hashes are our own (they are
not git's, though object ids of files are), ``expand=`` selects nothing, counts of downloads and likes are 0, and of a card's
metadata only what ``card.py`` lists is checked.
"""

from tests.hub_server.faults import Fault, Faults, Request
from tests.hub_server.server import HubServer

__all__ = ["Fault", "Faults", "HubServer", "Request"]
