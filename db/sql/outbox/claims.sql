-- Claims: leased batches of events for a handler.

create or replace function outbox.dead_letter_events(
    p_handler text, p_event_ids text[], p_reason text, p_at timestamptz
) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
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

comment on function outbox.dead_letter_events(text, text[], text, timestamptz) is
'Turns events in outbox.retries into dead letters with all their attempts, and writes audit entries.';

create or replace function outbox.expire_leases(p_handler text, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_dead text[];
    v_worker_deaths_max constant integer := 3;
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
        insert into outbox.retries as r (handler, event_id, worker_deaths, attempts, due_at)
        select
            p_handler, held.event_id, 1,
            jsonb_build_array(jsonb_build_object(
                'at', surety.format_time(lost.claimed_at), 'worker', lost.leased_by,
                'error', 'the lease ran out at ' || surety.format_time(lost.leased_until))),
            p_at
        from lost cross join unnest(lost.event_ids) as held (event_id)
        order by held.event_id
        on conflict (handler, event_id) do update
        set worker_deaths = r.worker_deaths + 1, attempts = r.attempts || excluded.attempts, due_at = excluded.due_at
        returning r.event_id, r.worker_deaths
    )
    select array_agg(event_id) filter (where worker_deaths >= v_worker_deaths_max) into v_dead from suspects;
    if v_dead is not null then
        perform outbox.dead_letter_events(p_handler, v_dead, 'its worker died ' || v_worker_deaths_max || ' times',
            p_at);
    end if;
end;
$$;

comment on function outbox.expire_leases(text, timestamptz) is
'Deletes the handler''s batches whose lease has expired. Each of their events becomes a poison-message candidate: it
counts a worker death instead of a failure and runs in a batch of its own. After three deaths it is a dead letter.';

create or replace function outbox.claim_due_retries(
    p_handler outbox.handlers, out event_ids text[], out is_suspect boolean
)
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    -- A suspect with two worker deaths runs only while no other suspect of any handler does.
    select array[r.event_id] into event_ids
    from outbox.retries as r
    where r.handler = p_handler.handler and r.due_at <= v_now and r.worker_deaths > 0
        and (
            r.worker_deaths = 1
            or not exists (select from outbox.batches as b where b.is_suspect and b.leased_until >= v_now)
        )
    order by r.worker_deaths, random()
    limit 1;
    is_suspect := found;
    if not is_suspect then
        select array_agg(due.event_id order by due.event_id) into event_ids
        from (
            select r.event_id from outbox.retries as r
            where r.handler = p_handler.handler and r.due_at <= v_now and r.worker_deaths = 0
            order by r.due_at
            limit p_handler.batch_size
        ) as due;
    end if;
    if event_ids is not null then
        update outbox.retries as r set due_at = null
        where r.handler = p_handler.handler and r.event_id = any(event_ids);
    end if;
end;
$$;

comment on function outbox.claim_due_retries(outbox.handlers) is
'Claims due retries of a handler: one suspect alone, else up to a batch of others. event_ids is null if none is due.';

create or replace function outbox.claim_new_events(p_handler outbox.handlers) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_handler outbox.handlers := p_handler;
    v_event_types text[] := array(
        select t.event_type from outbox.handler_events as t where t.handler = p_handler.handler);
    v_scan_limit integer := greatest(1000, 4 * p_handler.batch_size);
    v_goal pg_snapshot;
    v_scanned bigint;
    v_last_xid xid8;
    v_last_id text;
    v_is_new boolean;
    v_moved boolean := false;
    v_is_last boolean;
    v_ids text[];
begin
    for v_turn in 1..8 loop
        v_is_new := v_handler.goal is null;
        v_goal := coalesce(v_handler.goal, pg_current_snapshot());
        with scanned as materialized (
            select s.xid, s.id, s.type
            from outbox.scan_events(
                v_handler.generation, v_handler.seen, v_goal, v_handler.at_xid, v_handler.at_id, v_scan_limit) as s
        ),
        matched as materialized (
            select s.xid, s.id from scanned as s
            where s.type = any(v_event_types)
            order by s.xid, s.id
            limit v_handler.batch_size
        ),
        ends as (
            -- The cursor moves to the last event of a full batch, else past all scanned events.
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
        where h.handler = p_handler.handler;
    end if;
    return v_ids;
end;
$$;

comment on function outbox.claim_new_events(outbox.handlers) is
'Moves a handler''s cursor to its next batch of new events of its types, and returns their ids; null if it reached the
end without any. A call walks at most eight scans. A cursor that does not move is not written.';

create or replace function outbox.claim_batch(p_handler text, p_worker text, p_again_after interval default null)
returns table (
    batch_id bigint, fence bigint, event_ids text[], is_suspect boolean, leased_until timestamptz
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
-- Locks the handler's row until the commit, so the caller commits at once.
declare
    v_now timestamptz := surety.time_now();
    v_handler outbox.handlers;
    v_ids text[];
    v_is_retry boolean;
    v_is_suspect boolean;
begin
    perform outbox.check_restore_generation();
    select h.* into v_handler from outbox.handlers as h where h.handler = p_handler for update;
    if not found then
        raise exception 'no handler is named %', p_handler using errcode = 'SU004';
    end if;
    if v_handler.paused_at is not null then
        return;
    end if;
    if exists (select from outbox.batches as b where b.handler = p_handler and b.leased_until < v_now) then
        perform outbox.expire_leases(p_handler, v_now);
    end if;
    if v_handler.calls_provider and surety.all_accounts_unreachable() then
        return;
    end if;
    -- After a second, the last tenth of a batch counts as slow calls, which must not delay new batches.
    if (
        select count(*) from outbox.batches as b
        where b.handler = p_handler
            and (cardinality(b.event_ids) > v_handler.batch_size / 10 or b.claimed_at > v_now - interval '1 second')
    ) >= v_handler.batches_at_once then
        return;
    end if;

    select c.event_ids, c.is_suspect into v_ids, v_is_suspect from outbox.claim_due_retries(v_handler) as c;
    v_is_retry := v_ids is not null;
    if not v_is_retry then
        v_ids := outbox.claim_new_events(v_handler);
    end if;
    if v_ids is null then
        return;
    end if;
    if p_again_after is not null then
        update outbox.handlers as h set claims_again_at = v_now + p_again_after where h.handler = p_handler;
    end if;
    return query
    insert into outbox.batches as b (
        handler, event_ids, first_id, last_id, is_retry, is_suspect, fence, leased_by, leased_until, claimed_at
    )
    select
        p_handler, v_ids, min(i.id collate "C"), max(i.id collate "C"), v_is_retry, v_is_suspect,
        nextval('outbox.fences'), p_worker, v_now + v_handler.lease, v_now
    from unnest(v_ids) as i (id)
    returning b.id, b.fence, b.event_ids, b.is_suspect, b.leased_until;
end;
$$;

comment on function outbox.claim_batch(text, text, interval) is
'Claims a batch of events for a handler and returns it; no row if nothing is due, if the handler is paused, if no
account can be reached, or if batches_at_once batches are running. With p_again_after the caller announces another claim
after that time, and until then outbox.schedule_handlers schedules no further job. Raises SU004 for an unknown handler,
SU005 in a restored database. An empty claim writes and announces nothing.';
