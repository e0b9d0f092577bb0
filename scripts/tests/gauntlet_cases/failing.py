from rounds.base import Round, Violation


class Failing(Round):
    name = "failing"

    def run(self):
        raise Violation("It fails.", f"Seed {self.seed} says so.")
