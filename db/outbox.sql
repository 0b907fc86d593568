-- The outbox: an append-only log, walked by one pair of snapshots per handler, taken in leased batches.
--
--   claim    takes over what a dead worker left, then what is due again, then what is new; writes one batch row
--   finish   removes finished ids from the batch and renews the lease; the batch goes with its last id
--   fail     moves ids to outbox.retries, or to outbox.dead_letters when their delays are used up
--   release  moves ids back uncounted; db/breaker.sql says when a failure is the provider's
--   kick     wakes a worker after commit
--
-- The cursor's claim: every event whose transaction is visible in `seen` has been taken by exactly one batch; of those
-- visible in `goal` and not in `seen`, the ones up to (at_xid, at_id). A transaction that commits late is in no earlier
-- snapshot, so it is taken by a later goal; one that stays open delays nobody.

create or replace function outbox.emit(
    p_aggregate_type text, p_aggregate_id text, p_type text, p_payload jsonb, p_merchant_id text, p_version integer
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, epoch)
    select
        surety.new_id('evt', surety.time_now()),
        p_aggregate_type,
        p_aggregate_id,
        p_type,
        p_payload,
        p_merchant_id,
        p_version,
        outbox.epoch()
    returning id;
end;

create or replace function outbox.scan(
    p_epoch integer, p_seen pg_snapshot, p_goal pg_snapshot, p_at_xid xid8, p_at_id text, p_limit integer
) returns table (xid xid8, id text, type text)
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Events visible in p_goal and not in p_seen, after (p_at_xid, p_at_id), in order of (xid, id), at most p_limit.
-- The lower bound is one row comparison: two separate bounds on xid would make the index scan from the lower one.
declare
    v_low_xid xid8 := greatest(p_at_xid, pg_snapshot_xmax(p_seen));
    v_low_id text := case when p_at_xid >= pg_snapshot_xmax(p_seen) then p_at_id else '' end;
begin
    return query
    select found.xid, found.id, found.type
    from (
        (
            -- One look-up per open transaction: a join would walk the whole log and compare.
            select late.xid, late.id, late.type
            from pg_snapshot_xip(p_seen) as open (xid)
            cross join lateral (
                select e.xid, e.id, e.type
                from outbox.events as e
                where e.epoch = p_epoch and e.xid = open.xid and (e.xid, e.id) > (p_at_xid, p_at_id)
                order by e.xid, e.id
                limit p_limit
            ) as late
            where pg_visible_in_snapshot(open.xid, p_goal)
            order by late.xid, late.id
            limit p_limit
        )
        union all
        (
            select e.xid, e.id, e.type
            from outbox.events as e
            where e.epoch = p_epoch and (e.xid, e.id) > (v_low_xid, v_low_id) and e.xid < pg_snapshot_xmax(p_goal)
                and pg_visible_in_snapshot(e.xid, p_goal)
            order by e.xid, e.id
            limit p_limit
        )
    ) as found
    order by found.xid, found.id
    limit p_limit;
end;
$$;

create or replace function outbox.bury(p_handler text, p_event_ids text[], p_reason text, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Makes dead letters of events that stand in outbox.retries, keeping their errors, and tells the audit trail.
begin
    insert into outbox.dead_letters (id, handler, event_id, type, payment_id, payload, attempts, reason, died_at)
    select
        surety.new_id('dl', p_at), p_handler, e.id, e.type,
        case e.aggregate_type when 'payment' then e.aggregate_id else e.payload ->> 'payment_id' end, e.payload,
        r.attempts, p_reason, p_at
    from outbox.retries as r join outbox.events as e on e.id = r.event_id
    where r.handler = p_handler and r.event_id = any(p_event_ids)
    order by e.id
    on conflict (handler, event_id) where closed_at is null do nothing;
    delete from outbox.retries where handler = p_handler and event_id = any(p_event_ids);
    insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, reason, snapshot)
    select
        surety.new_id('aud', p_at), p_at, 'dead_letter', 'handler:' || p_handler,
        case e.aggregate_type when 'payment' then e.aggregate_id else e.payload ->> 'payment_id' end, e.merchant_id,
        'dead', p_reason,
        jsonb_build_object('event', e.id, 'type', e.type)
    from outbox.events as e where e.id = any(p_event_ids);
end;
$$;

create or replace function outbox.take_over(p_handler text, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Batches whose lease ran out: each event left in them is a suspect, counted as a kill, not as a failure; from now on
-- it runs alone. One that has seen three workers die is buried.
declare
    v_dead text[];
    v_kills_max constant integer := 3;
begin
    with lost as (
        delete from outbox.batches
        where id in (
            select b.id from outbox.batches as b
            where b.handler = p_handler and b.leased_until < p_at
            order by b.id for update skip locked
        )
        returning event_ids, leased_by, claimed_at, leased_until
    ),
    suspects as (
        insert into outbox.retries as r (handler, event_id, kills, attempts, due_at)
        select
            p_handler, held.event_id, 1,
            jsonb_build_array(jsonb_build_object(
                'at', surety.iso(lost.claimed_at), 'worker', lost.leased_by,
                'error', 'the lease ran out at ' || surety.iso(lost.leased_until))),
            p_at
        from lost cross join unnest(lost.event_ids) as held (event_id)
        order by held.event_id
        on conflict (handler, event_id) do update
        set kills = r.kills + 1, attempts = r.attempts || excluded.attempts, due_at = excluded.due_at
        returning r.event_id, r.kills
    )
    select array_agg(event_id) filter (where kills >= v_kills_max) into v_dead from suspects;
    if v_dead is not null then
        perform outbox.bury(p_handler, v_dead, 'its worker died ' || v_kills_max || ' times', p_at);
    end if;
end;
$$;

create or replace function outbox.list_handlers()
returns table (handler text, event_types text[], batch_size integer, lease_seconds double precision)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        handlers.handler,
        handlers.event_types,
        handlers.batch_size,
        extract(epoch from handlers.lease)::double precision
    from outbox.handlers
    order by handlers.handler;
end;
comment on function outbox.list_handlers() is
'Which handler wants which events, how many at once, and how long it may hold them before it must renew its lease.';

create or replace function outbox.claim_batch(p_handler text, p_worker text)
returns table (
    batch_id bigint, fence bigint, event_ids text[], is_suspect boolean, is_last boolean, leased_until timestamptz
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Takes work for p_handler: no row when there is none, or when enough of its batches are being worked on.
-- is_last: nothing else was due. What comes after is told by a kick of its own.
-- Locks the handler's row until commit, which is at once. A claim that finds nothing writes nothing.
declare
    v_now timestamptz := surety.time_now();
    v_handler outbox.handlers;
    v_ids text[];
    v_suspect boolean := false;
    v_retry boolean := true;
    v_goal pg_snapshot;
    v_scanned bigint;
    v_last_xid xid8;
    v_last_id text;
    v_scan_limit integer;
    v_is_new boolean;
    v_is_last boolean := false;
    v_moved boolean := false;
begin
    perform outbox.require_epoch();
    select h.* into v_handler from outbox.handlers as h where h.handler = p_handler for update;
    if not found then
        raise exception 'no handler is named %', p_handler using errcode = 'SU004';
    end if;
    if v_handler.paused_at is not null then
        return;
    end if;
    if exists (select from outbox.batches as b where b.handler = p_handler and b.leased_until < v_now) then
        perform outbox.take_over(p_handler, v_now);
    end if;
    if v_handler.calls_provider and surety.is_cut_off() then
        return;
    end if;
    -- What is left of a batch after a second are slow calls: they must not keep others waiting.
    if (
        select count(*) from outbox.batches as b
        where b.handler = p_handler
            and (cardinality(b.event_ids) > v_handler.batch_size / 10 or b.claimed_at > v_now - interval '1 second')
    ) >= v_handler.batches_at_once then
        return;
    end if;

    if exists (select from outbox.retries as r where r.handler = p_handler and r.due_at <= v_now) then
        -- A suspect that has seen two workers die runs while no other suspect does, whatever its handler.
        select array[r.event_id] into v_ids
        from outbox.retries as r
        where r.handler = p_handler and r.due_at <= v_now and r.kills > 0
            and (
                r.kills = 1
                or not exists (select from outbox.batches as b where b.is_suspect and b.leased_until >= v_now)
            )
        order by r.kills, random()
        limit 1;
        v_suspect := found;
        if not v_suspect then
            select array_agg(due.event_id order by due.event_id) into v_ids
            from (
                select r.event_id from outbox.retries as r
                where r.handler = p_handler and r.due_at <= v_now and r.kills = 0
                order by r.due_at
                limit v_handler.batch_size
            ) as due;
        end if;
    end if;
    if v_ids is not null then
        update outbox.retries as r set due_at = null where r.handler = p_handler and r.event_id = any(v_ids);
    else
        v_retry := false;
        v_scan_limit := greatest(1000, 4 * v_handler.batch_size);
        for v_turn in 1..8 loop
            v_is_new := v_handler.goal is null;
            v_goal := coalesce(v_handler.goal, pg_current_snapshot());
            with scanned as materialized (
                select s.xid, s.id, s.type
                from outbox.scan(
                    v_handler.epoch, v_handler.seen, v_goal, v_handler.at_xid, v_handler.at_id, v_scan_limit) as s
            ),
            matched as materialized (
                select s.xid, s.id from scanned as s
                where s.type = any(v_handler.event_types)
                order by s.xid, s.id
                limit v_handler.batch_size
            ),
            ends as (
                -- A full batch ends the walk at its last event; else everything scanned is behind us.
                (
                    select m.xid, m.id from matched as m
                    where (select count(*) from matched) = v_handler.batch_size
                    order by m.xid desc, m.id desc limit 1
                )
                union all
                (
                    select s.xid, s.id from scanned as s
                    where (select count(*) from matched) < v_handler.batch_size
                    order by s.xid desc, s.id desc limit 1
                )
            )
            select
                (select count(*) from scanned), (select array_agg(m.id order by m.id) from matched as m),
                (select e.xid from ends as e), (select e.id from ends as e)
            into v_scanned, v_ids, v_last_xid, v_last_id;
            exit when v_scanned = 0 and v_is_new;
            v_moved := true;
            if v_scanned = v_scan_limit or cardinality(v_ids) = v_handler.batch_size then
                v_handler.goal := v_goal;
                v_handler.at_xid := v_last_xid;
                v_handler.at_id := v_last_id;
            else
                v_handler.seen := v_goal;
                v_handler.goal := null;
                v_handler.at_xid := '0';
                v_handler.at_id := '';
            end if;
            v_is_last := v_is_new and v_handler.goal is null;
            exit when v_ids is not null or v_is_last;
        end loop;
        if v_moved then
            update outbox.handlers as h
            set seen = v_handler.seen, goal = v_handler.goal, at_xid = v_handler.at_xid, at_id = v_handler.at_id
            where h.handler = p_handler;
        end if;
    end if;
    if v_ids is null then
        return;
    end if;
    return query
    insert into outbox.batches as b (
        handler, event_ids, first_id, last_id, is_retry, is_suspect, fence, leased_by, leased_until, claimed_at
    )
    select
        p_handler, v_ids, min(i.id collate "C"), max(i.id collate "C"), v_retry, v_suspect, nextval('outbox.fences'),
        p_worker,
        v_now + v_handler.lease, v_now
    from unnest(v_ids) as i (id)
    returning b.id, b.fence, b.event_ids, b.is_suspect, v_is_last, b.leased_until;
end;
$$;

create or replace function outbox.claim(p_handler text, p_worker text)
returns table (batch_id bigint, fence bigint, event_ids text[], is_suspect boolean, leased_until timestamptz)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- For workers from before claim_batch; goes with the next deploy.
    select claimed.batch_id, claimed.fence, claimed.event_ids, claimed.is_suspect, claimed.leased_until
    from outbox.claim_batch(p_handler, p_worker) as claimed;
end;

create or replace function outbox.finish(p_batch bigint, p_fence bigint, p_event_ids text[]) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Takes p_event_ids out of the batch and renews its lease; false, and nothing done, when the lease is another's by now.
-- Call it last: the batch is the last lock of every transaction.
declare
    v_batch outbox.batches;
    v_left text[];
begin
    select b.* into v_batch from outbox.batches as b where b.id = p_batch and b.fence = p_fence for update;
    if not found then
        return false;
    end if;
    if v_batch.event_ids <@ p_event_ids then
        delete from outbox.batches where id = p_batch;
    else
        select coalesce(array_agg(held.event_id order by held.event_id), '{}') into v_left
        from unnest(v_batch.event_ids) as held (event_id)
        where held.event_id <> all(p_event_ids);
        update outbox.batches as b
        set event_ids = v_left, leased_until = surety.time_now() + h.lease
        from outbox.handlers as h
        where b.id = p_batch and h.handler = b.handler;
    end if;
    if v_batch.is_retry then
        delete from outbox.retries as r
        where r.handler = v_batch.handler and r.event_id = any(p_event_ids) and r.due_at is null;
    end if;
    return true;
end;
$$;

create or replace function outbox.renew(p_batch bigint, p_fence bigint) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with renewed as (
        update outbox.batches
        set leased_until = surety.time_now() + handlers.lease
        from outbox.handlers
        where batches.id = p_batch and batches.fence = p_fence and handlers.handler = batches.handler
        returning batches.id
    )

    select count(*) > 0 from renewed;
end;

create or replace function outbox.fail(p_batch bigint, p_fence bigint, p_failures jsonb) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- p_failures: [{"event_id", "error", "outage"?}]. Counts a failure for each, sets when it is due again (the handler's
-- delays, give or take 20 %), buries what has used them up. outage names the provider's account that failed it.
-- False, and nothing done, when the lease is another's by now.
declare
    v_now timestamptz := surety.time_now();
    v_batch outbox.batches;
    v_handler outbox.handlers;
    v_ids text[];
    v_dead text[];
begin
    select b.* into v_batch from outbox.batches as b where b.id = p_batch and b.fence = p_fence for update;
    if not found then
        return false;
    end if;
    select h.* into v_handler from outbox.handlers as h where h.handler = v_batch.handler;
    with failed as (
        insert into outbox.retries as r (handler, event_id, failures, attempts, due_at, blocked_by)
        select
            v_batch.handler, f.event_id, 1,
            jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
                'at', surety.iso(v_now), 'worker', v_batch.leased_by, 'error', left(f.error, 2000),
                'outage', f.outage))),
            v_now + v_handler.retry_after[1] * (0.8 + 0.4 * random()), f.outage
        from jsonb_to_recordset(p_failures) as f (event_id text, error text, outage text)
        where f.event_id = any(v_batch.event_ids)
        order by f.event_id
        on conflict (handler, event_id) do update
        set failures = r.failures + 1, attempts = r.attempts || excluded.attempts, blocked_by = excluded.blocked_by,
            due_at = v_now + v_handler.retry_after[least(r.failures + 1, cardinality(v_handler.retry_after))]
                * (0.8 + 0.4 * random())
        returning r.event_id, r.failures, r.attempts -> -1 ->> 'error' as error
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, reason, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'retry', v_batch.leased_by,
            case when e.aggregate_type = 'payment' then e.aggregate_id end, e.merchant_id, 'failed', f.error,
            jsonb_build_object(
                'handler', v_batch.handler, 'event', f.event_id, 'type', e.type, 'failures', f.failures)
        from failed as f join outbox.events as e on e.id = f.event_id
    )
    select array_agg(event_id), array_agg(event_id) filter (where failures > cardinality(v_handler.retry_after))
    into v_ids, v_dead from failed;
    if v_dead is not null then
        perform outbox.bury(
            v_batch.handler, v_dead, 'it failed ' || cardinality(v_handler.retry_after) + 1 || ' times', v_now);
    end if;
    return outbox.finish(p_batch, p_fence, coalesce(v_ids, '{}'));
end;
$$;

create or replace function outbox.release(
    p_batch bigint, p_fence bigint, p_event_ids text[], p_after interval, p_reason text, p_outage text default null,
    p_is_held boolean default false
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Gives events back uncounted, due again after p_after: the failure was not theirs (a busy provider, a stopped worker).
-- p_outage names the provider's account that is out; what is held for it without being tried makes no attempt.
declare
    v_now timestamptz := surety.time_now();
    v_batch outbox.batches;
begin
    select b.* into v_batch from outbox.batches as b where b.id = p_batch and b.fence = p_fence for update;
    if not found then
        return false;
    end if;
    insert into outbox.retries as r (handler, event_id, attempts, due_at, blocked_by)
    select
        v_batch.handler, held.event_id,
        case when p_is_held then '[]' else jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
            'at', surety.iso(v_now), 'worker', v_batch.leased_by, 'error', left(p_reason, 2000), 'outage', p_outage,
            'counted', false))) end,
        v_now + p_after, p_outage
    from unnest(v_batch.event_ids) as held (event_id)
    where held.event_id = any(p_event_ids)
    order by held.event_id
    on conflict (handler, event_id) do update
    set
        -- Only the last twenty: a provider may be busy for long.
        attempts = case when jsonb_array_length(r.attempts) >= 20 then r.attempts - 0 else r.attempts end
            || excluded.attempts,
        due_at = excluded.due_at,
        blocked_by = excluded.blocked_by;
    return outbox.finish(p_batch, p_fence, p_event_ids);
end;
$$;

create or replace function outbox.batch_events(p_batch bigint, p_fence bigint)
returns table (
    event_id text, type text, aggregate_id text, merchant_id text, version integer, payload jsonb, failures integer
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        events.id,
        events.type,
        events.aggregate_id,
        events.merchant_id,
        events.version,
        events.payload,
        coalesce(retries.failures, 0)::integer
    from outbox.batches
    cross join lateral unnest(batches.event_ids) as held (event_id)
    inner join outbox.events
        on held.event_id = events.id and events.id between batches.first_id and batches.last_id
    left join outbox.retries
        on batches.is_retry and batches.handler = retries.handler and held.event_id = retries.event_id
    where batches.id = p_batch and batches.fence = p_fence
    order by events.id;
end;
comment on function outbox.batch_events(bigint, bigint) is
'The events left in a batch; none when the lease is another''s by now. failures counts earlier attempts that failed.';

-- A handler that is added later starts with what commits from then on; name '1:1:' to start at the beginning. Which
-- events it handles is its code's business; how many at once, the operator's.
insert into outbox.handlers (handler, event_types, batch_size, batches_at_once, calls_provider, epoch, seen)
select
    h.handler,
    h.event_types,
    h.batch_size,
    h.batches_at_once,
    h.calls_provider,
    outbox.epoch(),
    case when exists (select from outbox.events) then pg_current_snapshot() else '1:1:'::pg_snapshot end
from (
    values
    ('submit', array['payment.initiated'], 200, 2, true),
    ('confirm', array['payment.provider_submitted'], 200, 2, true),
    ('settle', array['payment.confirmed'], 500, 2, false),
    ('close', array['payment.settled'], 500, 2, false),
    ('apply', array['webhook.received'], 200, 2, false),
    (
        'cancel',
        array[
            'payment.attempt_failed', 'payment.action_overdue', 'payment.cancel_requested', 'payment.authorized_late',
            'payment.orphan_found'
        ],
        200, 2, true
    ),
    ('capture', array['payment.capture_requested'], 200, 2, true),
    ('refund', array['refund.pending'], 200, 2, true),
    ('evidence', array['dispute.evidence_given'], 200, 2, true)
) as h (handler, event_types, batch_size, batches_at_once, calls_provider)
on conflict (handler) do update
set event_types = excluded.event_types, calls_provider = excluded.calls_provider
where (handlers.event_types, handlers.calls_provider) <> (excluded.event_types, excluded.calls_provider);
