// Load from k6: each user scores blank pictures, by our own service and by ModelInfer.
import grpc from "k6/net/grpc";
import encoding from "k6/encoding";
import { check } from "k6";

const client = new grpc.Client();
const shape = [1, 1, 8, 8];
const data = encoding.b64encode(new Uint8Array(64).buffer);

export const options = {
  vus: 4,
  iterations: 40,
  thresholds: { checks: ["rate==1"] },
  noUsageReport: true,
};

export default function () {
  if (__ITER === 0) {
    client.connect(__ENV.ADDRESS, { plaintext: true, reflect: true });
  }
  const score = client.invoke("likely.v1.ScoringService/Score", {
    model_name: "digits",
    images: { data, shape },
  });
  check(score, {
    "scored": (r) => r.status === grpc.StatusOK && r.message.scores[0].pValue > 0,
  });
  const infer = client.invoke("inference.GRPCInferenceService/ModelInfer", {
    model_name: "digits/score",
    inputs: [{ name: "images", datatype: "UINT8", shape, contents: { uint_contents: Array(64).fill(0) } }],
  });
  check(infer, {
    "inferred": (r) => r.status === grpc.StatusOK && r.message.outputs.length === 5,
  });
  const refused = client.invoke("likely.v1.ScoringService/Score", { model_name: "none" });
  check(refused, { "refused": (r) => r.status === grpc.StatusNotFound });
}
