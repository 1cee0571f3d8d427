// The benchmark of graphile-worker, with its local queue and batched completion; it keeps no history.
//
// The command line is that of the Python peers (common/peer.py), and what is measured too (common/measure.py):
// node program.mjs ACTION JSON prints one JSON object on one line. PEER_HOME is the folder of node_modules.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const require = createRequire(`${process.env.PEER_HOME}/`);
const { Logger, makeWorkerUtils, run } = require("graphile-worker");
const pg = require("pg");

const WARM_UP = 10; // single sends that are not measured
const SETTLE_MS = 1000; // until a worker listens
const SAMPLE_MS = 100;
const SEARCH_ROUNDS = 3;
const JOBS = "graphile_worker._private_jobs";

// Preferred first, by searches on a busy machine, so with little weight: `search` on a quiet one decides.
// `queue` is the size of the local queue, which wants to be larger than `concurrency`.
const worker = (concurrency, queue, pool = 10) => ({ concurrency, queue, pool, completeDelay: 0 });
const SETTINGS = {
  "send async": [4, 10, 20, 64].map((pool) => ({ pool })),
  batch: [20000, 5000, 1000, 100000].map((batch) => ({ batch, pool: 2 })),
  drain: [worker(100, 500), worker(24, 500), worker(10, 500), worker(24, 2000), worker(100, 2000), worker(24, 100)],
  latency: [worker(10, -1), worker(1, -1), worker(10, 500)],
  "send-when-asked": [{ pool: 1 }],
};

// The DSN as node-postgres takes it: a URI, or the words of a conninfo string.
function connection(dsn) {
  if (/^postgres(ql)?:/.test(dsn)) return { connectionString: dsn };
  const words = [...dsn.matchAll(/(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(\S+))/g)];
  const { dbname, ...given } = Object.fromEntries(words.map(([, k, q, v]) => [k, q?.replace(/\\(.)/g, "$1") ?? v]));
  return { ...given, database: dbname };
}

const now = () => Number(process.hrtime.bigint()); // CLOCK_MONOTONIC, in ns
const logger = new Logger(() => () => {});
const median = (numbers) => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

async function withPool(request, action) {
  const size = request.settings.pool ?? 2;
  const pgPool = new pg.Pool({ ...connection(request.dsn), min: size, max: size });
  const ignore = () => {}; // it wants handlers of errors, and does not find its own
  pgPool.on("error", ignore).on("connect", (client) => client.on("error", ignore));
  const utils = await makeWorkerUtils({ pgPool, logger });
  try {
    return await action(utils, pgPool);
  } finally {
    await utils.release();
    await pgPool.end();
  }
}

// Runs the action with a worker whose handler is `noop`.
async function withWorker(pgPool, settings, noop, action) {
  const { concurrency, queue, completeDelay } = settings;
  const options = { concurrentJobs: concurrency, localQueue: { size: queue }, completeJobBatchDelay: completeDelay };
  const runner = await run({ pgPool, logger, noHandleSignals: true, taskList: { noop }, preset: { worker: options } });
  try {
    return await action();
  } finally {
    await runner.stop();
  }
}

const number = async (pgPool, query) => Number((await pgPool.query(query)).rows[0].count);

async function fill(request, utils, pgPool) {
  await pgPool.query(`TRUNCATE ${JOBS}`);
  const size = request.settings.batch ?? SETTINGS.batch[0].batch;
  const began = now();
  for (let left = request.count; left > 0; left -= size) {
    const payload = request.payload;
    await utils.addJobs(Array.from({ length: Math.min(size, left) }, () => ({ identifier: "noop", payload })));
  }
  return { seconds: (now() - began) / 1e9 };
}

async function send(request, utils, pgPool) {
  if (request.mode === "blocking") return { unsupported: "JavaScript has no blocking calls" };
  await pgPool.query(`TRUNCATE ${JOBS}`);
  const latencies = [];
  const sender = async (first) => {
    for (let i = first; i < request.count; i += request.tasks) {
      const began = now();
      await utils.addJob("noop", request.payload);
      latencies.push((now() - began) / 1e6);
    }
  };
  const began = now();
  await Promise.all(Array.from({ length: request.tasks }, (_, first) => sender(first)));
  return { seconds: (now() - began) / 1e9, latencies_ms: latencies };
}

async function drain(request, utils, pgPool) {
  if (request.fill) await fill(request, utils, pgPool);
  if (request.fill) await pgPool.query("VACUUM ANALYZE");
  let left = request.count;
  const { promise, resolve } = Promise.withResolvers();
  const noop = async () => {
    if (--left === 0) resolve();
  };
  const began = now();
  return await withWorker(pgPool, request.settings, noop, async () => {
    await promise;
    while ((await number(pgPool, `SELECT count(*) FROM ${JOBS}`)) > 0) await sleep(2);
    return { seconds: (now() - began) / 1e9 };
  });
}

// The moment of the send travels in the payload; the next send is asked for when this one was handled.
async function latency(request, utils, pgPool) {
  await pgPool.query(`TRUNCATE ${JOBS}`);
  const { settings: _, ...asked } = request;
  const command = [process.argv[1], "send-when-asked", JSON.stringify(asked)];
  const sender = spawn(process.execPath, command, { stdio: ["pipe", "ignore", "inherit"] });
  const latencies = [];
  const { promise, resolve } = Promise.withResolvers();
  const noop = async ({ sent }) => {
    latencies.push((now() - sent) / 1e6);
    if (latencies.length === WARM_UP + request.count) resolve();
    else sender.stdin.write("\n");
  };
  return await withWorker(pgPool, request.settings, noop, async () => {
    await sleep(SETTLE_MS);
    sender.stdin.write("\n");
    await promise;
    sender.stdin.end();
    await once(sender, "exit");
    return { latencies_ms: latencies.slice(WARM_UP) };
  });
}

async function sendWhenAsked(request, utils) {
  for await (const _ of createInterface({ input: process.stdin })) {
    await sleep(request.pause_ms * (0.5 + Math.random()));
    await utils.addJob("noop", { ...request.payload, sent: now() });
  }
  return {};
}

// Runs an action, and looks meanwhile how many sessions the peer has in the database.
async function measured(action, request) {
  const watch = new pg.Client({ ...connection(request.dsn), application_name: "benchmark" });
  await watch.connect();
  let most = 0;
  let left = false;
  const query = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
    AND backend_type = 'client backend' AND application_name <> 'benchmark'`;
  const look = async () => {
    for (let pause = SAMPLE_MS / 64; !left; pause = Math.min(2 * pause, SAMPLE_MS)) {
      await sleep(pause); // short at first: short runs are seen too
      most = Math.max(most, await number(watch, query));
    }
  };
  const looking = look();
  try {
    const answer = await withPool(request, (utils, pgPool) => action(request, utils, pgPool));
    return { count: request.count, ...answer, connections: most, settings: request.settings };
  } finally {
    left = true;
    await looking;
    await watch.end();
  }
}

const cost = (answer) => answer.seconds ?? median(answer.latencies_ms ?? [0]);

async function search(action, requests) {
  const answers = requests.map(() => []);
  for (let round = 0; round < SEARCH_ROUNDS; round++)
    for (const [i, request] of requests.entries()) answers[i].push(await measured(action, request));
  const tried = answers.map((each, i) => ({ cost: median(each.map(cost)), settings: requests[i].settings }));
  const best = tried.findIndex((each) => each.cost === Math.min(...tried.map((other) => other.cost)));
  return { ...answers[best].sort((a, b) => cost(a) - cost(b))[0], tried };
}

async function main([name, json]) {
  const wanted = { count: 1000, mode: "async", tasks: 1, payload: {}, pause_ms: 20, ...JSON.parse(json) };
  const setup = async (_, utils) => (await utils.migrate(), { ok: true });
  const actions = { setup, send, batch: fill, drain, latency, "send-when-asked": sendWhenAsked };
  const action = actions[name];
  if (!action) return { unsupported: name === "call" ? "it keeps no results" : `there is no action ${name}` };
  const kind = name === "send" ? `send ${wanted.mode}` : name;
  const candidates = wanted.settings ? [wanted.settings] : (SETTINGS[kind] ?? [{}]);
  const requests = candidates.map((settings) => ({ ...wanted, settings }));
  return wanted.search ? await search(action, requests) : await measured(action, requests[0]);
}

console.log(JSON.stringify(await main(process.argv.slice(2))));
