import os

from rounds import invariants
from rounds.base import Round


class Keeping(Round):
    name = "keeping"

    def run(self):
        # It needn't be looked for any longer.
        invariants.PATIENCE = 0
        os.pipe()
        return {"pipes": 1}
