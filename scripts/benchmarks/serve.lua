-- The load of `scripts/bench serve`, for wrk: texts of a file, one request after another on each connection.
--   wrk ... -s serve.lua URL -- TEXTS_FILE TEXTS_A_REQUEST REQUESTS_A_SECOND
-- With a rate, each connection waits between two requests for a time drawn from an exponential distribution, so that
-- requests come as by chance and not in step. Prints one line of JSON.
local bodies, number, mean = {}, 0, 0
local threads = {}

function setup(thread)
  thread:set("seed", #threads)
  table.insert(threads, thread)
end

function init(args)
  local each, rate = tonumber(args[2]), tonumber(args[3])
  mean = tonumber(args[4]) and rate > 0 and 1000 * tonumber(args[4]) / rate or 0
  local texts = {}
  for line in io.lines(args[1]) do table.insert(texts, line) end
  for first = 1, #texts - each + 1, each do
    table.insert(bodies, '{"texts": [' .. table.concat(texts, ", ", first, first + each - 1) .. "]}")
  end
  math.randomseed(seed + 1)
  number = math.random(#bodies)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  number = number % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[number])
end

function delay()
  return mean > 0 and -mean * math.log(1 - math.random()) or 0
end

function done(summary, latency, requests)
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "failed": %d, "refused": %d, "p50_ms": %.3f, "p90_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    summary.errors.status, latency:percentile(50) / 1000, latency:percentile(90) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
