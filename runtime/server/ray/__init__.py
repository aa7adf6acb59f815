"""The server on Ray Serve: `serve run headfold.runtime.server.ray:app bundle=PATH replicas=2`. Needs the extra `ray`.

An ingress takes requests and gives each to the replica that has computed how its prompt begins; every replica runs the whole
application of `headfold serve`.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that starts after this: headfold reports nothing

from headfold.runtime.server.ray.application import app
from headfold.runtime.server.ray.arguments import Arguments

__all__ = ["Arguments", "app"]
