"""The clients: numpy in, typed answers out, every failure a `LikelyError`.

`Client` and `AsyncClient` divide large inputs to the server's limits and join the answers; gRPC
itself retries what a busy or restarting server refuses. `AdminClient` asks the admin port.
"""

from likely.client.admin import AdminClient
from likely.client.asynchronous import AsyncClient
from likely.client.blocking import Client
from likely.client.credentials import TokenFile
from likely.client.line import ADDRESS, TIMEOUT

__all__ = ["ADDRESS", "TIMEOUT", "AdminClient", "AsyncClient", "Client", "TokenFile"]
