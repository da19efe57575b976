"""Nodes for tests of checkpoints: folders that hold some ranks' shards."""

from __future__ import annotations

import shutil
from pathlib import Path

from cfe_hpc.checkpoints.manifest import MANIFEST, data_name, index_name
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.checkpoints.tiers.places import NodeTier


def node(base: Path, number: int, *, local_rank: int = 0, **options) -> NodeTier:
    """The tier of a rank on node `number`, whose disk is a folder in `base`."""
    home = nodelocal.expand_home("$BASE/node-$NODE", "run-1", {"BASE": str(base), "NODE": str(number)})
    nodelocal.make_home(home)
    options = {"keep_last": 1, "limit_bytes": None, "partner": True, **options}
    address, hosts = "127.0.0.1", tuple(f"node-{each}" for each in range(8))
    return NodeTier(home=home, node=number, local_rank=local_rank, hosts=hosts, address=address, **options)


def scatter(checkpoint: Path, *homes: Path, partner: bool = True, manifest: bool = True) -> list[Path]:
    """Move a committed checkpoint, one rank a node, from the shared folder to the nodes; their folders of it."""
    identity = read_manifest(checkpoint).identity
    folders = [home / nodelocal.copy_name(identity) for home in homes]
    for number, folder in enumerate(folders):
        folder.mkdir()
        ranks = {number, (number - 1) % len(homes)} if partner else {number}
        for name in [name(rank) for rank in ranks for name in (data_name, index_name)]:
            shutil.copy(checkpoint / name, folder / name)
        if manifest:
            shutil.copy(checkpoint / MANIFEST, folder / MANIFEST)
    shutil.rmtree(checkpoint)
    return folders
