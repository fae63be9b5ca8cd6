// node run.cjs MODEL FEED: answer one batch with a model.onnx, in onnxruntime-node and nothing else.
//
// FEED is JSON: {"inputs": {name: {"type", "dims", "data"}}, "runs": [{}, {"thresholds": [...]}, ...]}.
// Prints, per run, {"probabilities": {"dims", "data"}, "exit": {"dims", "data"}}.
const fs = require("node:fs");
const ort = require("onnxruntime-node");

async function main(model, file) {
  const feed = JSON.parse(fs.readFileSync(file, "utf8"));
  const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1 });
  const inputs = {};
  for (const [name, { type, dims, data }] of Object.entries(feed.inputs)) {
    inputs[name] = new ort.Tensor(type, Float32Array.from(data), dims);
  }
  const answers = [];
  for (const run of feed.runs) {
    const given = { ...inputs };
    if (run.thresholds) {
      given.thresholds = new ort.Tensor("float32", Float32Array.from(run.thresholds), [run.thresholds.length]);
    }
    const made = await session.run(given);
    answers.push({
      probabilities: { dims: made.probabilities.dims, data: Array.from(made.probabilities.data) },
      exit: { dims: made.exit.dims, data: Array.from(made.exit.data, Number) },
    });
  }
  process.stdout.write(JSON.stringify(answers));
}

main(process.argv[2], process.argv[3]).catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
});
