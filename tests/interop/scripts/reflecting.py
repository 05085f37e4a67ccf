"""Asks a server with grpc_requests, which learns the schema from reflection, and prints JSON.

Runs where grpc_requests is installed and likely is not: `reflecting.py ADDRESS`.
"""

import base64
import json
import sys

from grpc_requests import Client


def main() -> None:
    """Prints the services, and what a blank picture scores by each protocol."""
    client = Client.get_by_endpoint(sys.argv[1])
    data = base64.b64encode(bytes(64)).decode()
    request = {"model_name": "digits", "images": {"data": data, "shape": [1, 1, 8, 8]}}
    blank = {"uint_contents": [0] * 64}
    shape = [1, 1, 8, 8]
    images = {"name": "images", "datatype": "UINT8", "shape": shape, "contents": blank}
    asked = {"model_name": "digits/score", "inputs": [images]}
    stream = [{"sequence_id": n, "request": request} for n in range(3)]
    found = {
        "services": sorted(client.service_names),
        "score": client.request("likely.v1.ScoringService", "Score", request),
        "stream": list(client.request("likely.v1.ScoringService", "ScoreStream", stream)),
        "infer": client.request("inference.GRPCInferenceService", "ModelInfer", asked),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
