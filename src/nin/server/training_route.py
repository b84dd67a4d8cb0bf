"""The route that says how far the training of the run is, and which epoch's network answers."""

import asyncio
from pathlib import Path

from fastapi import FastAPI

from nin.server import schemas
from nin.server.service import Service
from nin.server.training_status import training_status


def add_training(app: FastAPI, run: Path | None, service: Service) -> None:
    """Add the route."""

    @app.get("/api/training")
    async def training() -> schemas.Training:
        """Say how far the training of the run is, with its curves."""
        if run is None:
            return schemas.Training(state="none", text="No run was given.")
        await service.refresh()
        status = await asyncio.to_thread(training_status, run)
        status.answers = service.runs[0].metadata.unfinished if service.runs else ""
        return status
