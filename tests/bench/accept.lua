-- wrk's part of `accept`: POSTs whose Idempotency-Key and reference nobody has used before.
-- Arguments after `--`: a word that makes this run's keys its own, whether to keep the ids of answers ("ids"), API keys.
-- The last line of stdout is one JSON object; ids go to stderr's place in the report, one per line before it.

local threads = {}

function setup(thread)
    thread:set("number", #threads)
    table.insert(threads, thread)
end

function init(args)
    run, api_keys, count, refused, ids = args[1], {}, 0, 0, {}
    for place = 3, #args do table.insert(api_keys, "Bearer " .. args[place]) end
    if args[2] == "ids" then
        response = function(status, headers, body)
            if status == 201 then table.insert(ids, string.match(body, "pay_%x+")) else refused = refused + 1 end
        end
    end
end

function request()
    count = count + 1
    local key = run .. "-" .. number .. "-" .. count
    local headers = {
        ["Authorization"] = api_keys[1 + count % #api_keys],
        ["Content-Type"] = "application/json",
        ["Idempotency-Key"] = key,
    }
    local body = '{"amount": 4999, "currency": "usd", "payment_method": {"type": "card", "token": "pm_card_visa"}, '
        .. '"reference": "' .. key .. '", "description": "Two books and a lamp", "metadata": {"cart": "9"}}'
    return wrk.format("POST", nil, headers, body)
end

function done(summary, latency, requests)
    for _, thread in ipairs(threads) do
        for _, id in ipairs(thread:get("ids")) do io.write(id, "\n") end
    end
    local errors = summary.errors
    io.write(string.format(
        '{"answers": %d, "seconds": %.6f, "errors": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
        summary.requests, summary.duration / 1e6,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
