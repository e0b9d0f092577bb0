import asyncio

from rounds.base import Round

from django.db import transaction


class Passing(Round):
    name = "passing"

    def run(self):
        return {"numbers": self.run_async(self.write())}

    async def write(self):
        from rounds.models import Entry

        async with transaction.aatomic():
            await Entry.objects.acreate(name=str(self.random.random()))
        await asyncio.sleep(0)
        return await Entry.objects.acount()
