"""The clients: numpy arrays in, typed answers out, and a `LikelyError` for every failure.

`Client` and `AsyncClient` split large inputs at the server's limits and join the answers; gRPC
itself retries requests that a busy or restarting server refuses. `AdminClient` is for the admin
port.
"""

from likely.client.admin import AdminClient
from likely.client.asynchronous import AsyncClient
from likely.client.blocking import Client
from likely.client.credentials import TokenFile
from likely.client.rpcs import ADDRESS, TIMEOUT

__all__ = ["ADDRESS", "TIMEOUT", "AdminClient", "AsyncClient", "Client", "TokenFile"]
