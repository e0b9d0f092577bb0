from rounds import invariants
from rounds.base import Round

held = []


class Holding(Round):
    name = "holding"

    def run(self):
        from django.db import connection

        # It needn't be looked for any longer.
        invariants.PATIENCE = 0
        held.append(connection.copy())
        return {"connections": 1}
