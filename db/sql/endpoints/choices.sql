-- Choices about an endpoint: what it is sent from now on, and what it skips. Each is a range of its log.

create or replace function outbox.begin_range(
    p_endpoint outbox.webhook_endpoints, p_starts outbox.log_position, p_actor text, p_at timestamptz
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    insert into outbox.webhook_ranges (
        endpoint_id, number, is_skipped, event_types, from_event_id, starts, chosen_at, chosen_by
    )
    select
        p_endpoint.id,
        coalesce(max(webhook_ranges.number), 0) + 1,
        false,
        p_endpoint.event_types,
        p_endpoint.from_event_id,
        p_starts,
        p_at,
        p_actor
    from outbox.webhook_ranges
    where webhook_ranges.endpoint_id = p_endpoint.id;
end;

comment on function outbox.begin_range(outbox.webhook_endpoints, outbox.log_position, text, timestamptz) is
'Begins the range that an endpoint is sent from now on, with its present filter. The caller has ended the one before.';

create or replace function outbox.end_range(p_endpoint outbox.webhook_endpoints) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    update outbox.webhook_ranges set ends = outbox.position_of(p_endpoint)
    where webhook_ranges.endpoint_id = p_endpoint.id and not webhook_ranges.is_skipped
        and webhook_ranges.ends is null;
end;

comment on function outbox.end_range(outbox.webhook_endpoints) is
'Ends the range that an endpoint is sent, where its cursor stands.';

create or replace function outbox.skip_events(
    p_endpoint outbox.webhook_endpoints, p_before_id text, p_actor text, p_at timestamptz
) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Events that failed before are skipped as well: each gets a row in the delivery log.
declare
    v_now outbox.log_position := outbox.position_now();
    v_count bigint;
    v_first text;
    v_retries bigint;
begin
    with skipped as (
        delete from outbox.delivery_retries as r
        where r.endpoint_id = p_endpoint.id and (p_before_id is null or r.event_id < p_before_id)
            and (r.due_at is not null or r.given_up_at is not null)
        returning r.event_id, r.failures
    ),
    logged as (
        insert into outbox.delivery_attempts (id, endpoint_id, event_id, outcome, attempt, error)
        select surety.new_id('dat', p_at), p_endpoint.id, s.event_id, 'skipped', s.failures, 'skipped by ' || p_actor
        from skipped as s
        returning 1
    )
    select count(*), min(s.event_id) into v_retries, v_first from skipped as s;
    select count(*) + v_retries, least(v_first, min(e.id)) into v_count, v_first
    from outbox.events as e
    where e.merchant_id = p_endpoint.merchant_id and e.generation >= p_endpoint.generation
        and (p_before_id is null or e.id < p_before_id)
        and e.id >= p_endpoint.from_event_id
        and outbox.is_wanted(e.type, p_endpoint.event_types)
        and not outbox.is_before(outbox.position_of(p_endpoint), e.generation, e.xid, e.id);
    insert into outbox.webhook_ranges (
        endpoint_id, number, is_skipped, event_types, starts, ends, chosen_at, chosen_by, skipped_from, skipped_to,
        skipped_count
    )
    select
        p_endpoint.id, max(r.number) + 1, true, p_endpoint.event_types, outbox.position_of(p_endpoint), v_now, p_at,
        p_actor, surety.time_of_id(v_first), coalesce(surety.time_of_id(p_before_id), p_at), v_count
    from outbox.webhook_ranges as r where r.endpoint_id = p_endpoint.id
    having v_count > 0;
    return v_count;
end;
$$;

comment on function outbox.skip_events(outbox.webhook_endpoints, text, text, timestamptz) is
'Lists what an endpoint skips by choice, from its cursor until now or up to the id p_before_id, and returns the number
of events. Deliveries that wait for a retry or were given up are skipped too. The caller moves the cursor.';

create or replace function outbox.enable_endpoint(p_id text, p_from text, p_hours integer, p_actor text)
returns table (skipped bigint)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_at timestamptz := surety.time_now();
    v_endpoint outbox.webhook_endpoints;
    v_starts outbox.log_position;
    v_before_id text;
begin
    select w.* into v_endpoint from outbox.webhook_endpoints as w where w.id = p_id and w.deleted_at is null for update;
    if not found then
        return;
    end if;
    skipped := 0;
    v_starts := outbox.position_of(v_endpoint);
    if p_from <> 'there' then
        v_before_id := case
            when p_from = 'hours'
                then greatest(v_endpoint.from_event_id, surety.id_at('evt', v_at - make_interval(hours => p_hours)))
        end;
        skipped := outbox.skip_events(v_endpoint, v_before_id, p_actor, v_at);
        perform outbox.end_range(v_endpoint);
        if v_before_id is null then
            v_starts := outbox.position_now();
        else
            v_endpoint.from_event_id := v_before_id;
        end if;
        perform outbox.begin_range(v_endpoint, v_starts, p_actor, v_at);
    end if;
    update outbox.webhook_endpoints as w
    set
        disabled_at = null, disabled_because = null, not_before = v_at, failing_since = null, failed_attempts = 0,
        noticed_percent = 0, updated_at = v_at, generation = v_starts.generation, seen = v_starts.seen,
        goal = v_starts.goal, at_xid = v_starts.at_xid, at_id = v_starts.at_id,
        from_event_id = v_endpoint.from_event_id
    where w.id = p_id;
    update outbox.delivery_retries as r set due_at = v_at where r.endpoint_id = p_id and r.due_at > v_at;
    perform outbox.audit_endpoint(v_endpoint, p_actor, 'webhook endpoint enabled', jsonb_build_object(
        'from', p_from, 'hours', p_hours, 'skipped', skipped));
    return next;
end;
$$;

comment on function outbox.enable_endpoint(text, text, integer, text) is
'Enables an endpoint and returns how many events it skips; no row without such an endpoint. p_from: there, it goes on
where it stood; hours, with the events of the last p_hours of those; now, with events that are committed from now on.';

create or replace function outbox.disable_endpoint(p_id text, p_because text, p_actor text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_endpoint outbox.webhook_endpoints;
begin
    update outbox.webhook_endpoints as w
    set disabled_at = surety.time_now(), disabled_because = p_because, updated_at = surety.time_now()
    where w.id = p_id and w.deleted_at is null and w.disabled_at is null
    returning w.* into v_endpoint;
    if found then
        perform outbox.audit_endpoint(v_endpoint, p_actor, 'webhook endpoint disabled', jsonb_build_object(
            'because', p_because));
        return true;
    end if;
    return false;
end;
$$;

comment on function outbox.disable_endpoint(text, text, text) is
'Disables an endpoint: nothing is sent, and its cursor stays where it is. Whether it was enabled.';

create or replace function outbox.delete_endpoint(p_id text, p_actor text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_at timestamptz := surety.time_now();
    v_endpoint outbox.webhook_endpoints;
begin
    update outbox.webhook_endpoints as w
    set
        disabled_at = coalesce(w.disabled_at, v_at), disabled_because = coalesce(w.disabled_because, 'deleted'),
        deleted_at = v_at, updated_at = v_at
    where w.id = p_id and w.deleted_at is null
    returning w.* into v_endpoint;
    perform outbox.skip_events(v_endpoint, null, p_actor, v_at);
    perform outbox.end_range(v_endpoint);
    delete from outbox.delivery_batches as b where b.endpoint_id = p_id;
    delete from outbox.delivery_retries as r where r.endpoint_id = p_id;
    delete from outbox.webhook_secrets as s where s.endpoint_id = p_id;
    perform outbox.audit_endpoint(v_endpoint, p_actor, 'webhook endpoint deleted', '{}');
end;
$$;

comment on function outbox.delete_endpoint(text, text) is
'Deletes an endpoint and its secrets. Its row and its log stay, and what it had not been sent is listed as skipped.';

create or replace function outbox.replay_events(
    p_endpoint_id text, p_event_ids text[], p_from timestamptz, p_before timestamptz, p_undelivered boolean,
    p_is_dry boolean, p_actor text
) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_at timestamptz := surety.time_now();
    v_endpoint outbox.webhook_endpoints;
    v_ids text [];
    v_max constant integer := 100000;
begin
    select w.* into v_endpoint
    from outbox.webhook_endpoints as w where w.id = p_endpoint_id and w.deleted_at is null for update;
    v_ids := array(
        select e.id
        from outbox.events as e
        where e.merchant_id = v_endpoint.merchant_id
            and (p_event_ids is null or e.id = any(p_event_ids))
            and (p_from is null or e.id >= surety.id_at('evt', p_from))
            and (p_before is null or e.id < surety.id_at('evt', p_before))
            and (p_event_ids is not null or outbox.is_wanted(e.type, v_endpoint.event_types))
            and (not p_undelivered or exists (
                select from outbox.delivery_retries as r
                where r.endpoint_id = v_endpoint.id and r.event_id = e.id and r.given_up_at is not null))
            -- Events that the cursor has not reached are sent in any case.
            and outbox.is_before(outbox.position_of(v_endpoint), e.generation, e.xid, e.id)
            and not exists (
                select from outbox.delivery_batches as b
                where b.endpoint_id = v_endpoint.id and e.id = any(b.event_ids))
        order by e.id
        limit v_max
    );
    if not p_is_dry and cardinality(v_ids) > 0 then
        insert into outbox.delivery_retries as r (endpoint_id, event_id, failures, due_at)
        select v_endpoint.id, i.id, 0, v_at from unnest(v_ids) as i (id)
        on conflict (endpoint_id, event_id) do update set failures = 0, due_at = v_at, given_up_at = null;
        perform outbox.audit_endpoint(v_endpoint, p_actor, 'webhook deliveries replayed', jsonb_build_object(
            'count', cardinality(v_ids), 'first', v_ids[1], 'last', v_ids[cardinality(v_ids)]));
    end if;
    return cardinality(v_ids);
end;
$$;

comment on function outbox.replay_events(text, text[], timestamptz, timestamptz, boolean, boolean, text) is
'Sends events of an endpoint''s merchant to it again, under the same webhook-id, and returns how many; p_is_dry: only
counts them. By ids, by time, or those that were given up (p_undelivered). Without ids the endpoint''s filter applies.
At most 100,000 at once.';
