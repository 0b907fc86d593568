-- The circuit breaker: one circuit per provider account, shared by all workers. Outages don't count against events, and
-- neither do refusals of our access (401, 403).
--
--   count  workers report the results of their calls; too many failures open the account's circuit
--   open   events of the account are held, failures of the last two minutes no longer count, and handlers that call the
--          provider claim nothing while all circuits are open
--   probe  one worker at a time makes a harmless call, at growing intervals
--   close  a probe was answered: held events are due at once
--
-- Timeouts, broken connections and 5xx responses are failures of the provider. A decline or another 4xx response is an
-- answer, and so is 429. A failure counts against its event only while the account is otherwise healthy.
--
-- A refused call makes a worker probe its account. Only a refused probe opens the circuit. Otherwise the key lacks a
-- permission for that call, and its event alone waits (release cause access_refused). If the platform's own account is
-- refused as well, it is the key, and the circuits of all accounts open and close together.
--
-- Locks: after payments and before the batch. Rows of outbox.retries that are locked are skipped: their events are
-- being handled, and outbox.release_events uncounts their failures when it holds them.

create or replace function surety.open_circuit(
    p_provider text, p_account text, p_cause text, p_reason text, p_actor text
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_accounts text[] := array[p_account];
    v_keys text[];
    v_circuit surety.circuit_breakers;
begin
    if p_cause = 'key_refused' then
        v_accounts := array(
            select p_account union select '' union select m.provider_account from surety.merchants as m
        );
    end if;
    with opened as (
        insert into surety.circuit_breakers as b (
            provider, account, bucket_at, opened_at, next_probe_at, cause, reason
        )
        select
            p_provider, a.account, v_now, v_now,
            case when p_cause <> 'key_refused' or a.account = '' then v_now + surety.probe_delay(0, p_cause) end,
            p_cause, p_reason
        from unnest(v_accounts) as a (account)
        order by a.account
        on conflict (provider, account) do update
        set
            opened_at = excluded.opened_at,
            cause = excluded.cause,
            reason = excluded.reason,
            -- A circuit that opens again within five minutes was closed too early.
            probes = case when b.closed_at > v_now - interval '5 minutes' then b.probes else 0 end,
            next_probe_at = case
                when excluded.next_probe_at is not null then v_now + surety.probe_delay(
                    case when b.closed_at > v_now - interval '5 minutes' then b.probes else 0 end, p_cause)
            end
        -- A provider that refuses us is not out any more; one that is out may refuse us still.
        where b.opened_at is null or (b.cause = 'outage' and excluded.cause <> 'outage')
        returning b.account
    )
    select array_agg(surety.circuit_key(p_provider, o.account)) into v_keys from opened as o;
    if v_keys is null then
        return false;
    end if;
    with blocked as (
        select r.handler, r.event_id
        from outbox.retries as r
        where r.blocked_by = any(v_keys)
        order by r.handler, r.event_id
        for update skip locked
    )
    update outbox.retries as r
    set
        failures = greatest(0, r.failures - uncounted.times),
        attempts = uncounted.attempts,
        due_at = case when r.due_at is not null then v_now + surety.hold_duration() end
    from blocked as b
    join outbox.retries as held on held.handler = b.handler and held.event_id = b.event_id
    cross join lateral outbox.uncount_attempts(held.attempts, held.blocked_by, v_now) as uncounted
    where r.handler = b.handler and r.event_id = b.event_id;
    select b.* into strict v_circuit
    from surety.circuit_breakers as b where b.provider = p_provider and b.account = p_account;
    perform audit.write_entry(
        'system', p_actor, 'circuit opened', p_reason,
        p_snapshot => jsonb_build_object(
            'provider', p_provider, 'account', p_account, 'cause', p_cause, 'accounts', cardinality(v_keys),
            'answered', v_circuit.answered + v_circuit.prior_answered,
            'failed', v_circuit.failed + v_circuit.prior_failed,
            'next_probe_at', surety.format_time(v_circuit.next_probe_at)));
    return true;
end;
$$;

comment on function surety.open_circuit(text, text, text, text, text) is
'Opens an account''s circuit, or those of all accounts if p_cause is key_refused. Failed attempts of the last two
minutes no longer count, and their events wait until it closes. A refusal replaces an outage as the cause, not the
reverse. Returns false and changes nothing if it is open already.';

create or replace function surety.read_clock() returns timestamptz
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select surety.time_now();
end;

comment on function surety.read_clock() is
'The current time, for workers, whose clocks may differ from the database''s.';

create or replace function surety.count_call_results(p_provider text, p_calls jsonb, p_actor text)
returns table (account text, is_open boolean, is_refused boolean, answered_seconds double precision)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_bucket constant interval := '30 seconds';
    v_consecutive_failures_max constant integer := 10;
    v_failed_min constant integer := 5;
    v_failing record;
begin
    insert into surety.circuit_breakers as b (provider, account, bucket_at, answered, failed, consecutive_failures,
        answered_at)
    select
        p_provider, c.account, v_now, c.answered, c.failed, c.consecutive_failures, c.answered_at
    from jsonb_to_recordset(p_calls) as c (
        account text, answered integer, failed integer, consecutive_failures integer, answered_at timestamptz
    )
    order by c.account
    on conflict on constraint circuit_breakers_pkey do update
    set
        bucket_at = case when b.bucket_at > v_now - v_bucket then b.bucket_at else v_now end,
        answered = case when b.bucket_at > v_now - v_bucket then b.answered else 0 end + excluded.answered,
        failed = case when b.bucket_at > v_now - v_bucket then b.failed else 0 end + excluded.failed,
        prior_answered = case
            when b.bucket_at > v_now - v_bucket then b.prior_answered
            when b.bucket_at > v_now - 2 * v_bucket then b.answered
            else 0
        end,
        prior_failed = case
            when b.bucket_at > v_now - v_bucket then b.prior_failed
            when b.bucket_at > v_now - 2 * v_bucket then b.failed
            else 0
        end,
        consecutive_failures = case when excluded.answered_at is null then b.consecutive_failures
            else 0 end + excluded.consecutive_failures,
        answered_at = greatest(b.answered_at, excluded.answered_at);
    for v_failing in
        select b.account, b.consecutive_failures, b.failed + b.prior_failed as failed,
            b.answered + b.prior_answered as answered
        from surety.circuit_breakers as b
        join jsonb_to_recordset(p_calls) as c (account text, failed integer, in_flight integer)
            on b.provider = p_provider and b.account = c.account
        where c.failed > 0 and b.opened_at is null
            and (
                -- Of calls made at once, those that fail end first: failures right after an answer are no outage, and
                -- commands in flight may be answered.
                b.consecutive_failures >= v_consecutive_failures_max
                and coalesce(b.answered_at < v_now - interval '1 second', true)
                or b.failed + b.prior_failed
                >= greatest(v_failed_min, b.answered + b.prior_answered + coalesce(c.in_flight, 0))
            )
        order by b.account
    loop
        perform surety.open_circuit(
            p_provider, v_failing.account, 'outage',
            format(
                '%s of %s calls failed, the last %s in a row',
                v_failing.failed, v_failing.failed + v_failing.answered, v_failing.consecutive_failures),
            p_actor);
    end loop;
    return query
    select
        b.account, b.opened_at is not null, coalesce(b.cause, 'outage') <> 'outage',
        extract(epoch from v_now - b.answered_at)::double precision
    from surety.circuit_breakers as b
    where b.provider = p_provider and (
        b.opened_at is not null
        or b.account in (select c.account from jsonb_to_recordset(p_calls) as c (account text))
    )
    order by b.account;
end;
$$;

comment on function surety.count_call_results(text, jsonb, text) is
'Counts the results of a worker''s calls, and opens circuits with too many failures. p_calls: [{"account", "answered",
"failed", "in_flight"?, "consecutive_failures", "answered_at"?}]: commands answered, calls failed, commands that have
not ended, calls failed since the last answer, and the time of that answer or an earlier one. Returns these accounts and
all accounts whose circuit is open (is_refused: by a refusal), with the seconds since any worker had an answer from
them.';

create or replace function surety.claim_circuit_probes(p_provider text) returns text[]
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- The next probe is scheduled before this one is made, so a worker that dies in between leaves it to another.
    with due as (
        select circuit_breakers.account
        from surety.circuit_breakers
        where
            circuit_breakers.provider = p_provider and circuit_breakers.next_probe_at <= surety.time_now()
            and (
                circuit_breakers.account = ''
                or not exists (
                    select from surety.circuit_breakers as platform
                    where
                        platform.provider = p_provider and platform.account = ''
                        and platform.cause = 'key_refused'
                )
            )
        order by circuit_breakers.account
        for update skip locked
    ),

    claimed as (
        update surety.circuit_breakers
        set
            probes = circuit_breakers.probes + 1,
            next_probe_at = surety.time_now()
            + surety.probe_delay(circuit_breakers.probes + 1, circuit_breakers.cause)
        from due
        where circuit_breakers.provider = p_provider and circuit_breakers.account = due.account
        returning circuit_breakers.account
    )

    select coalesce(array_agg(claimed.account order by claimed.account), '{}') from claimed;
end;

comment on function surety.claim_circuit_probes(text) is
'The accounts to probe now, each for one worker. While the key is refused, only the platform''s.';

create or replace function surety.close_circuit(p_provider text, p_account text, p_reason text, p_actor text)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_cause text;
    v_opened_at timestamptz;
    v_keys text[];
begin
    select b.cause, b.opened_at into v_cause, v_opened_at
    from surety.circuit_breakers as b
    where b.provider = p_provider and b.account = p_account;
    with closing as (
        select b.account
        from surety.circuit_breakers as b
        where b.provider = p_provider and b.opened_at is not null
            and (b.account = p_account or (v_cause = 'key_refused' and b.cause = 'key_refused'))
        order by b.account
        for update
    ),
    closed as (
        update surety.circuit_breakers as b
        set
            opened_at = null, next_probe_at = null, cause = null, closed_at = v_now, bucket_at = v_now,
            consecutive_failures = 0, answered = 0, failed = 0, prior_answered = 0, prior_failed = 0
        from closing as c
        where b.provider = p_provider and b.account = c.account
        returning b.account
    )
    select array_agg(surety.circuit_key(p_provider, c.account)) into v_keys from closed as c;
    if v_keys is null then
        return false;
    end if;
    with held as (
        select r.handler, r.event_id
        from outbox.retries as r
        where r.blocked_by = any(v_keys) and r.due_at > v_now
        order by r.handler, r.event_id
        for update skip locked
    )
    update outbox.retries as r
    set due_at = v_now
    from held as h
    where r.handler = h.handler and r.event_id = h.event_id;
    -- A list that failed with the circuit says nothing about the account that answers. A list that still fails is noted
    -- again by its next reading.
    update surety.poll_cursors as l
    set failures = 0, failing_since = null, error = null, is_refused = false
    where l.failures > 0 and surety.circuit_key(l.provider, l.account) = any(v_keys)
        and (l.is_refused or l.failing_since > v_opened_at - interval '2 minutes');
    perform audit.write_entry(
        'system', p_actor, 'circuit closed', p_reason,
        p_snapshot => jsonb_build_object(
            'provider', p_provider, 'account', p_account, 'cause', v_cause, 'accounts', cardinality(v_keys),
            'open_seconds', round(extract(epoch from v_now - v_opened_at), 3)));
    perform outbox.schedule_due_handlers();
    return true;
end;
$$;

comment on function surety.close_circuit(text, text, text, text) is
'Closes an account''s circuit, resets its counts, makes its held events due, and forgets that lists were refused or
began to fail when it opened. If the key was refused, the answer of one account closes all that opened for that. Returns
false and changes nothing if it is closed already.';

create or replace function surety.hold_blocked_events(p_batch bigint, p_fence bigint, p_event_ids text[]) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The lock on open circuits makes a concurrent close_circuit wait, so that it sees the events that are held here.
declare
    v_held text[] := '{}';
    v_blocked record;
begin
    perform from surety.circuit_breakers as b where b.opened_at is not null order by b.provider, b.account for share;
    for v_blocked in
        select b.provider, b.account, array_agg(e.event_id) as ids
        from outbox.batch_events(p_batch, p_fence) as e
        left join surety.payments as p on p.id = e.aggregate_id
        left join surety.merchants as m on m.id = e.merchant_id
        join surety.circuit_breakers as b
            on b.account = coalesce(p.provider_account, m.provider_account) and b.opened_at is not null
        where e.event_id = any(p_event_ids)
            -- Most events of a payment that has ended make no call.
            and (
                coalesce(p.state, '') not in ('failed', 'canceled')
                or e.type in ('payment.authorized_late', 'payment.orphan_found')
            )
        group by b.provider, b.account
        order by b.provider, b.account
    loop
        perform outbox.release_events(
            p_batch, p_fence, v_blocked.ids, surety.hold_duration(),
            'circuit_open', 'held: its account''s circuit is open',
            surety.circuit_key(v_blocked.provider, v_blocked.account), true);
        v_held := v_held || v_blocked.ids;
    end loop;
    return v_held;
end;
$$;

comment on function surety.hold_blocked_events(bigint, bigint, text[]) is
'Releases the events of a batch whose account has an open circuit, uncounted and before any call, unless their payment
has ended without a charge. Returns their ids.';

create or replace function surety.uncount_outage_failures(p_results jsonb) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The lock makes concurrent transactions that open or close the circuits wait, or waits for them. So a circuit that
-- opens meanwhile uncounts the failures that are recorded here.
declare
    v_failing_min constant integer := 5;
    v_uncounted_max constant integer := 18;
begin
    perform
    from surety.circuit_breakers as b
    where surety.circuit_key(b.provider, b.account) in (
        select r.result ->> 'outage' from jsonb_array_elements(p_results) as r (result))
    order by b.provider, b.account
    for share;
    return (
        select jsonb_agg(
            case
                when released.seconds is null then r.result
                else r.result || jsonb_build_object(
                    'release_seconds', released.seconds, 'release_cause', released.cause,
                    -- An event that waits by itself is held by no circuit.
                    'outage', case when released.cause <> 'access_refused' then r.result -> 'outage' end)
            end
            order by r.n
        )
        from jsonb_array_elements(p_results) with ordinality as r (result, n)
        left join outbox.batches as held on held.id = (r.result ->> 'batch_id')::bigint
        left join surety.circuit_breakers as b on surety.circuit_key(b.provider, b.account) = r.result ->> 'outage'
        left join lateral (
            select count(*)::integer as times
            from outbox.retries as t
            cross join lateral jsonb_array_elements(t.attempts) as a (attempt)
            where t.handler = held.handler and t.event_id = r.result ->> 'event_id' and r.result ? 'outage'
                and a.attempt ? 'outage' and a.attempt ? 'counted'
        ) as uncounted on true
        cross join lateral (
            select
                case
                    when b.opened_at is not null then extract(epoch from surety.hold_duration())
                    when r.result ? 'release_seconds' then null
                    when r.result ? 'access_refused' then 0
                    when uncounted.times < v_uncounted_max and b.failed + b.prior_failed >= v_failing_min
                        then extract(epoch from surety.probe_delay(uncounted.times, 'outage'))
                end as seconds,
                case
                    when b.opened_at is not null then 'circuit_open'
                    when r.result ? 'access_refused' then 'access_refused'
                    else 'outage'
                end as cause
        ) as released
    );
end;
$$;

comment on function surety.uncount_outage_failures(jsonb) is
'The results of surety.record_results, with "release_seconds" and "release_cause" for each that failed by an
outage of its account ("outage": the circuit''s key), or was refused ("access_refused" as well). All are held while the
circuit is open. While it is closed, a refused event is tried again by itself; and if fewer than five of the account''s
calls failed lately, or after eighteen uncounted failures, a failure is the event''s own.';
