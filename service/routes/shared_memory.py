"""Sessions of shared memory, for clients on this host."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from ..context import Context, Reader

router = APIRouter(tags=["shared memory"])


class SessionInfo(BaseModel):
    """Where to fetch the memory: an abstract Unix socket, and the ticket to show there, in hexadecimal digits."""

    id: str
    socket: str
    ticket: str
    nbytes: int


@router.post("/v1/shared-memory", status_code=201, summary="Open a session of shared memory")
async def open_session(context: Context, caller: Reader) -> SessionInfo:
    """Linux only. The session ends with the connection to the socket; claim it within ten seconds."""
    session = await context.run(lambda: context.shared_memory.open(caller.tenant.pool))
    return SessionInfo(
        id=session.id,
        socket=context.shared_memory.name,
        ticket=session.ticket.hex(),
        nbytes=context.shared_memory.session_bytes,
    )
