from rounds.base import Round


class Forgetful(Round):
    name = "forgetful"

    def run(self):
        async def forgotten():
            pass

        forgotten()
        return {"coroutines": 1}
