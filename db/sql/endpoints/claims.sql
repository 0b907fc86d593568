-- Claims: which endpoints have something to be sent, and leased batches of it. Accepting and stepping a payment writes
-- nothing for an endpoint: deliveries come from the log and the endpoint's cursor.

create or replace function outbox.find_due_endpoints(p_mark pg_snapshot, p_is_full boolean)
returns table (endpoint_ids text[], mark text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_scan_max constant integer := 2000;
    v_now timestamptz := surety.time_now();
    v_goal pg_snapshot := pg_current_snapshot();
    v_generation integer;
    v_scanned integer;
    v_news text [];
    v_is_full boolean := p_is_full or p_mark is null;
begin
    if not exists (select from outbox.webhook_endpoints as w where w.disabled_at is null) then
        return;
    end if;
    v_generation := outbox.current_restore_generation();
    if not v_is_full then
        -- Endpoints of merchants that have new events since the mark; types that no filter names are passed over.
        select count(*), array_agg(distinct e.merchant_id) filter (where e.merchant_id is not null)
        into v_scanned, v_news
        from outbox.scan_events(v_generation, p_mark, v_goal, '0', '', v_scan_max) as s
        join outbox.events as e on e.id = s.id;
        v_is_full := v_scanned = v_scan_max;
    end if;
    endpoint_ids := array(
        select w.id
        from outbox.webhook_endpoints as w
        where w.disabled_at is null and (w.not_before is null or w.not_before <= v_now)
            and (
                w.goal is not null or w.not_before is not null or w.generation < v_generation
                or w.merchant_id = any(v_news)
                or exists (
                    select from outbox.delivery_batches as b where b.endpoint_id = w.id and b.leased_until < v_now)
                or w.id in (select r.endpoint_id from outbox.delivery_retries as r where r.due_at <= v_now)
                or (v_is_full and exists (
                    select from outbox.walk_events(false, w.merchant_id, w.generation, w.seen, v_goal, '0', '', 1)))
            )
        order by random()
    );
    mark := v_goal::text;
    return next;
end;
$$;

comment on function outbox.find_due_endpoints(pg_snapshot, boolean) is
'Enabled endpoints that may have something to be sent, in random order, and a mark for the next call, which looks at
events after it only; p_is_full: at each endpoint''s cursor. Endpoints that a worker is sending to are among them: each
worker remembers its own. No row while no endpoint is enabled. It writes nothing.';

create or replace function outbox.claim_endpoint_events(p_endpoint outbox.webhook_endpoints, p_limit integer)
returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    w outbox.webhook_endpoints := p_endpoint;
    v_all constant pg_snapshot := '9223372036854775807:9223372036854775807:';
    v_last_generation integer := outbox.current_restore_generation();
    v_scan_limit constant integer := 1000;
    v_goal pg_snapshot;
    v_scanned integer;
    v_last_xid xid8;
    v_last_id text;
    v_is_new boolean;
    v_is_moved boolean := false;
    v_ids text [];
begin
    for v_turn in 1..8 loop
        v_is_new := w.goal is null;
        -- A restore generation that has ended gets no more events: all of them are visible.
        v_goal := coalesce(
            w.goal, case when w.generation < v_last_generation then v_all else pg_current_snapshot() end);
        with scanned as materialized (
            select s.xid, s.id, s.type
            from outbox.walk_events(
                false, w.merchant_id, w.generation, w.seen, v_goal, w.at_xid, w.at_id, v_scan_limit) as s
        ),
        wanted as materialized (
            select s.xid, s.id from scanned as s
            where s.id >= w.from_event_id and outbox.is_wanted(s.type, w.event_types)
            order by s.xid, s.id
            limit p_limit
        ),
        ends as (
            (
                select n.xid, n.id from wanted as n
                where (select count(*) from wanted) = p_limit
                order by n.xid desc, n.id desc limit 1
            )
            union all
            (
                select s.xid, s.id from scanned as s
                where (select count(*) from wanted) < p_limit
                order by s.xid desc, s.id desc limit 1
            )
        )
        select
            (select count(*) from scanned), (select array_agg(n.id order by n.xid, n.id) from wanted as n),
            (select e.xid from ends as e), (select e.id from ends as e)
        into v_scanned, v_ids, v_last_xid, v_last_id;
        exit when v_scanned = 0 and v_is_new and w.generation = v_last_generation;
        v_is_moved := true;
        if v_scanned = v_scan_limit or cardinality(v_ids) = p_limit then
            w.goal := v_goal;
            w.at_xid := v_last_xid;
            w.at_id := v_last_id;
        else
            -- The goal is reached.
            w.goal := null;
            w.at_xid := '0';
            w.at_id := '';
            if v_goal::text = v_all::text then
                w.generation := w.generation + 1;
                w.seen := '1:1:';
            else
                w.seen := v_goal;
            end if;
        end if;
        exit when v_ids is not null or (v_is_new and w.goal is null and v_goal::text <> v_all::text);
    end loop;
    if v_is_moved then
        update outbox.webhook_endpoints as e
        set generation = w.generation, seen = w.seen, goal = w.goal, at_xid = w.at_xid, at_id = w.at_id
        where e.id = w.id;
    end if;
    return v_ids;
end;
$$;

comment on function outbox.claim_endpoint_events(outbox.webhook_endpoints, integer) is
'Moves an endpoint''s cursor past its next events, at most p_limit that it wants, and returns their ids; null if there
are none. The caller has locked the endpoint. The cursor is that of outbox.claim_new_events: no event of a transaction
that commits late is skipped. Events of ended restore generations come first.';

create or replace function outbox.claim_deliveries(
    p_worker text, p_endpoint_ids text[], p_events_max integer, p_lease interval
) returns table (
    endpoint_id text, fence bigint, event_ids text[], url text, payload text, api_version text, concurrency integer,
    rate_max integer, secrets jsonb, is_full boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
-- Locks endpoints until the commit, so the caller commits at once.
declare
    v_probed_after constant integer := 5;
    v_now timestamptz := surety.time_now();
    v_endpoint outbox.webhook_endpoints;
    v_max integer;
    v_retries text [];
    v_dead text [];
begin
    perform outbox.check_restore_generation();
    if (outbox.restore_generation()).is_drill then
        return;
    end if;
    for v_endpoint in
        select w.* from outbox.webhook_endpoints as w
        where w.id = any(p_endpoint_ids) and w.disabled_at is null and (w.not_before is null or w.not_before <= v_now)
        order by w.id
        for no key update skip locked
    loop
        -- The batch of a dead worker: its deliveries may have arrived, and are repeated under the same webhook-id.
        delete from outbox.delivery_batches as b
        where b.endpoint_id = v_endpoint.id and b.leased_until < v_now
        returning b.event_ids into v_dead;
        if found then
            insert into outbox.delivery_retries as r (endpoint_id, event_id, due_at)
            select v_endpoint.id, d.id, v_now from unnest(v_dead) as d (id) order by d.id
            on conflict on constraint delivery_retries_pkey do update set due_at = v_now;
        end if;
        continue when exists (select from outbox.delivery_batches as b where b.endpoint_id = v_endpoint.id);
        -- An endpoint that fails gets one event at a time.
        v_max := case when v_endpoint.failed_attempts >= v_probed_after then 1 else p_events_max end;
        with due as (
            select r.event_id from outbox.delivery_retries as r
            where r.endpoint_id = v_endpoint.id and r.due_at <= v_now
            order by r.due_at, r.event_id
            limit greatest(v_max / 2, 1)
        ),
        taken as (
            update outbox.delivery_retries as r set due_at = null
            from due where r.endpoint_id = v_endpoint.id and r.event_id = due.event_id
            returning r.event_id
        )
        select array_agg(t.event_id) into v_retries from taken as t;
        event_ids := v_retries;
        if coalesce(cardinality(v_retries), 0) < v_max then
            -- A replayed event may still lie before the cursor: it is sent once.
            event_ids := array(
                select distinct i.id from unnest(
                    v_retries || outbox.claim_endpoint_events(v_endpoint, v_max - coalesce(cardinality(v_retries), 0))
                ) as i (id) order by i.id
            );
        end if;
        if coalesce(cardinality(event_ids), 0) = 0 then
            if v_endpoint.not_before is not null then
                update outbox.webhook_endpoints as w set not_before = null where w.id = v_endpoint.id;
            end if;
            continue;
        end if;
        insert into outbox.delivery_batches as b (endpoint_id, fence, event_ids, leased_by, leased_until)
        values (v_endpoint.id, nextval('outbox.fences'), event_ids, p_worker, v_now + p_lease)
        returning b.fence into fence;
        endpoint_id := v_endpoint.id;
        url := v_endpoint.url;
        payload := v_endpoint.payload;
        api_version := v_endpoint.api_version;
        concurrency := v_endpoint.concurrency;
        rate_max := v_endpoint.rate_max;
        is_full := cardinality(event_ids) >= p_events_max / 2
            or v_endpoint.generation < outbox.current_restore_generation();
        secrets := (
            select jsonb_agg(
                jsonb_build_object(
                    'scheme', s.scheme, 'sealing_key', s.sealing_key, 'sealed', encode(s.sealed, 'base64'))
                order by s.id desc)
            from outbox.webhook_secrets as s
            where s.endpoint_id = v_endpoint.id and (s.expires_at is null or s.expires_at > v_now)
        );
        return next;
    end loop;
end;
$$;

comment on function outbox.claim_deliveries(text, text[], integer, interval) is
'Claims a batch of events for each of these endpoints that has any: due retries, at most half a batch, then new events.
An endpoint has one batch at a time, so its concurrency and rate hold for all workers together. is_full: there may be
more. Secrets come as the API encrypted them. Nothing is claimed in a copy opened by `surety drill`. Raises SU005 in a
restored database.';

create or replace function outbox.renew_deliveries(p_fences bigint[], p_lease interval) returns bigint[]
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with renewed as (
        update outbox.delivery_batches set leased_until = surety.time_now() + p_lease
        where delivery_batches.fence = any(p_fences)
        returning delivery_batches.fence
    )

    select array_agg(renewed.fence) from renewed;
end;

comment on function outbox.renew_deliveries(bigint[], interval) is
'Renews the leases of batches that are still held, and returns their fences.';
