// Asks a server everything through the protos and prints the answers as one JSON object.
// node ask.js ADDRESS PROTOS, with {"data": base64, "shape": [n, c, h, w]} on standard input.
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, protos] = process.argv.slice(2);
const given = JSON.parse(readFileSync(0, "utf8"));
const images = { data: Buffer.from(given.data, "base64"), shape: given.shape };

const files = ["scoring", "generation", "models"].map((name) => `likely/v1/${name}.proto`);
const definition = loader.loadSync(files, {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
});
const { v1 } = grpc.loadPackageDefinition(definition).likely;
const plain = grpc.credentials.createInsecure();
const models = new v1.ModelService(address, plain);
const scoring = new v1.ScoringService(address, plain);
const generation = new v1.GenerationService(address, plain);

const unary = (client, method, request) => promisify(client[method]).call(client, request);

async function refused(promise) {
  const { code, details } = await promise.then(() => ({ code: grpc.status.OK }), (error) => error);
  return { code: grpc.status[code], details };
}

async function drawn(request) {
  const chunks = [];
  for await (const chunk of generation.Generate(request)) chunks.push(chunk);
  return {
    shapes: chunks.map((chunk) => chunk.images.shape),
    labels: chunks.flatMap((chunk) => chunk.labels),
    data: Buffer.concat(chunks.map((chunk) => chunk.images.data)).toString("base64"),
  };
}

const list = await unary(models, "ListModels", {});
const model_name = list.models[0].name;
const score = await unary(scoring, "Score", { model_name, images, alpha: 0.05, surprise: true });
console.log(
  JSON.stringify({
    model: (await unary(models, "GetModel", { model_name })).model,
    score: { ...score, surprise: score.surprise.toString("base64") },
    classify: await unary(scoring, "Classify", { model_name, images }),
    generate: await drawn({ model_name, label: 3, count: 5, seed: 7 }),
    refused: await refused(unary(scoring, "Score", { model_name, images, alpha: 2 })),
  }),
);
for (const client of [models, scoring, generation]) client.close();
