-- The outbox: an append-only log of events. Each handler reads it with a cursor of two snapshots, in leased batches.
--
--   emit      appends an event in the transaction of the change that it reports
--   claim     writes one batch row: events of expired leases first, then due retries, then new events
--   complete  removes events from the batch and renews the lease; the batch row goes with its last event
--   fail      moves events to outbox.retries, or to outbox.dead_letters after their last delay
--   release   moves events to outbox.retries without counting a failure
--   schedule  starts a worker job after the commit
--
-- The cursor's invariant: every event visible in `seen` was claimed by exactly one batch, and of the events visible in
-- `goal` and not in `seen`, those up to (at_xid, at_id). A transaction that commits late is in no earlier snapshot, so
-- a later goal includes its events; a transaction that stays open delays no other event.

create or replace function outbox.keep_traceparents(p_traceparents jsonb) returns void
language sql volatile
begin atomic
    select set_config('surety.traceparents', p_traceparents::text, true);
end;

comment on function outbox.keep_traceparents(jsonb) is
'Gives the events that this transaction emits from here on a trace context: {aggregate id: traceparent}; that of "" is
for all others.';

create or replace function outbox.traceparent_of(p_aggregate_id text) returns text
language sql stable
begin atomic
    select coalesce(kept.traceparents ->> p_aggregate_id, kept.traceparents ->> '')
    from (select nullif(current_setting('surety.traceparents', true), '')::jsonb as traceparents) as kept;
end;

comment on function outbox.traceparent_of(text) is
'The trace context that outbox.keep_traceparents gave the events of an aggregate in this transaction, or null.';

create or replace function outbox.emit_event(
    p_aggregate_type text, p_aggregate_id text, p_type text, p_payload jsonb, p_merchant_id text, p_version integer
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_id text;
begin
    insert into outbox.events (
        id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation, at, traceparent
    )
    select
        surety.new_id('evt', v_now), p_aggregate_type, p_aggregate_id, t.type, p_payload,
        case when t.is_for_merchants then p_merchant_id end, p_version, outbox.current_restore_generation(), v_now,
        outbox.traceparent_of(p_aggregate_id)
    from outbox.event_types as t
    where t.type = p_type
    returning id into v_id;
    if not found then
        raise exception 'no event has the type %', p_type using errcode = 'SU007';
    end if;
    return v_id;
end;
$$;

comment on function outbox.emit_event(text, text, text, jsonb, text, integer) is
'Appends an event and returns its id. The merchant sees it if its type is for merchants. Raises SU007 for a type that
outbox.event_types lacks.';

create or replace function outbox.walk_events(
    p_is_for_all boolean, p_merchant_id text, p_generation integer, p_seen pg_snapshot, p_goal pg_snapshot,
    p_at_xid xid8, p_at_id text, p_limit integer
) returns table (xid xid8, id text, type text)
language sql stable
begin atomic
    select
        found.xid,
        found.id,
        found.type
    from (
        (
            -- One index look-up per transaction that was open: a join would read the whole log.
            select late.*
            from pg_snapshot_xip(p_seen) as open (xid)
            cross join lateral (
                select
                    events.xid,
                    events.id,
                    events.type
                from outbox.events
                where
                    (p_is_for_all or events.merchant_id = p_merchant_id)
                    and events.generation = p_generation
                    and events.xid = open.xid
                    and (events.xid, events.id) > (p_at_xid, p_at_id)
                order by events.xid, events.id
                limit p_limit
            ) as late
            where pg_visible_in_snapshot(open.xid, p_goal)
            order by late.xid, late.id
            limit p_limit
        )
        union all
        (
            -- The lower bound is one row comparison: with two bounds the index scan would start at the lower xid.
            select
                events.xid,
                events.id,
                events.type
            from outbox.events
            where
                (p_is_for_all or events.merchant_id = p_merchant_id)
                and events.generation = p_generation
                and (events.xid, events.id)
                > (
                    greatest(p_at_xid, pg_snapshot_xmax(p_seen)),
                    case when p_at_xid >= pg_snapshot_xmax(p_seen) then p_at_id else '' end
                )
                and events.xid < pg_snapshot_xmax(p_goal)
                and pg_visible_in_snapshot(events.xid, p_goal)
            order by events.xid, events.id
            limit p_limit
        )
    ) as found
    order by found.xid, found.id
    limit p_limit;
end;

comment on function outbox.walk_events(boolean, text, integer, pg_snapshot, pg_snapshot, xid8, text, integer) is
'The next events of a snapshot cursor: visible in p_goal and not in p_seen, after (p_at_xid, p_at_id), ordered by (xid,
id), at most p_limit; all events (p_is_for_all) or those of one merchant. PostgreSQL expands it in its callers, because
it has no settings: with a constant p_is_for_all each caller gets the plan of its index.';

create or replace function outbox.scan_events(
    p_generation integer, p_seen pg_snapshot, p_goal pg_snapshot, p_at_xid xid8, p_at_id text, p_limit integer
) returns table (xid xid8, id text, type text)
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
begin
    return query
    select w.xid, w.id, w.type
    from outbox.walk_events(true, null, p_generation, p_seen, p_goal, p_at_xid, p_at_id, p_limit) as w;
end;
$$;

comment on function outbox.scan_events(integer, pg_snapshot, pg_snapshot, xid8, text, integer) is
'The next events of a handler''s cursor, as outbox.walk_events returns them, by the index on (generation, xid, id).';

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
'The events left in a batch, with the count of their earlier failures. No row if the lease is lost.';
