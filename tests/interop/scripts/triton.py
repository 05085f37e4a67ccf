"""Asks a server with tritonclient, synchronously and not, and prints what it is told as JSON.

Runs where tritonclient is installed and likely is not: `triton.py ADDRESS < pictures.json`.
"""

import asyncio
import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio


def tensor(name: str, values: Any, datatype: str) -> Any:
    """An input."""
    given = triton.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values)
    return given


def arrays(answer: Any) -> dict[str, Any]:
    """All outputs of an answer."""
    names = [output.name for output in answer.get_response().outputs]
    return {name: answer.as_numpy(name).tolist() for name in names}


def synchronous(address: str, x: Any) -> dict[str, Any]:
    """What the synchronous client is told."""
    images = tensor("images", x, "UINT8")
    count = tensor("count", np.array([5]), "INT64")
    with triton.InferenceServerClient(address) as client:
        found = {
            "ready": [client.is_server_live(), client.is_server_ready()],
            "models": {
                model.name: client.is_model_ready(model.name)
                for model in client.get_model_repository_index().models
            },
            "metadata": client.get_model_metadata("digits/score", as_json=True),
            "config": client.get_model_config("digits/score", as_json=True)["config"],
            "everything": arrays(client.infer("digits", [images], parameters={"alpha": "0.05"})),
            "p_value": arrays(
                client.infer("digits", [images], outputs=[triton.InferRequestedOutput("p_value")])
            ),
            "generate": arrays(
                client.infer("digits/generate", [count], parameters={"seed": 7, "label": 3})
            ),
        }
        try:
            client.infer("digits", [images], parameters={"alpha": "7"})
        except triton.InferenceServerException as error:
            found["refused"] = [error.status(), error.message()]
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for row in range(len(x)):
            one = tensor("images", x[row : row + 1], "UINT8")
            client.async_stream_infer("digits/score", [one], request_id=str(row))
        streamed = [answers.get(timeout=30) for _ in x]
        client.stop_stream()
        found["streamed"] = {
            result.get_response().id: result.as_numpy("log_likelihood")[0] for result, _ in streamed
        }
        found["statistics"] = client.get_inference_statistics("digits/score", as_json=True)
    return found


async def asynchronous(address: str, x: Any) -> dict[str, Any]:
    """What the client for asyncio is told."""
    async with triton_aio.InferenceServerClient(address) as client:
        answers = await asyncio.gather(
            *(
                client.infer("digits/classify", [tensor("images", x[row : row + 1], "UINT8")])
                for row in range(len(x))
            )
        )
        return {
            "ready": await client.is_model_ready("digits"),
            "label": [int(answer.as_numpy("label")[0]) for answer in answers],
            "posterior": [answer.as_numpy("posterior")[0].tolist() for answer in answers],
        }


def main() -> None:
    """Prints both."""
    x = np.array(json.load(sys.stdin), np.uint8)
    found = synchronous(sys.argv[1], x)
    found["aio"] = asyncio.run(asynchronous(sys.argv[1], x))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
