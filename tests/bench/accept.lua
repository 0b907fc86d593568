-- The wrk script of `accept`: POSTs of new payments, each with a new Idempotency-Key and reference.
-- Arguments after `--`: a prefix of this run's keys; "ids" to print the ids of accepted payments; API keys.
-- Output: the ids, one per line, then one JSON object on the last line.

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
        .. '"return_url": "https://shop.example/return", '
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
