-- The end of a batch's events: completed, failed, released. All three return false and do nothing if the lease is lost,
-- which the fence shows. The batch is the last lock of every transaction, so they are called last.

create or replace function outbox.complete_events(p_batch bigint, p_fence bigint, p_event_ids text[]) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
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

comment on function outbox.complete_events(bigint, bigint, text[]) is
'Removes completed events from a batch and renews its lease. False, and nothing done, if the lease is lost.';

create or replace function outbox.renew_lease(p_batch bigint, p_fence bigint) returns boolean
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

comment on function outbox.renew_lease(bigint, bigint) is
'Renews a batch''s lease. False if the lease is lost.';

create or replace function outbox.fail_events(p_batch bigint, p_fence bigint, p_failures jsonb) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
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
                'at', surety.format_time(v_now), 'worker', v_batch.leased_by, 'error', left(f.error, 2000),
                'outage', f.outage))),
            v_now + v_handler.retry_after[1] * (0.8 + 0.4 * random()), f.outage
        from jsonb_to_recordset(p_failures) as f (event_id text, error text, outage text)
        where f.event_id = any(v_batch.event_ids)
        order by f.event_id
        on conflict (handler, event_id) do update
        set failures = r.failures + 1, attempts = r.attempts || excluded.attempts, blocked_by = excluded.blocked_by,
            cause = null, releases = 0, waiting_since = null,
            due_at = v_now + v_handler.retry_after[least(r.failures + 1, cardinality(v_handler.retry_after))]
                * (0.8 + 0.4 * random())
        returning r.event_id, r.failures, r.attempts -> -1 ->> 'error' as error
    ),
    audited as (
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
        perform outbox.dead_letter_events(
            v_batch.handler, v_dead, 'it failed ' || cardinality(v_handler.retry_after) + 1 || ' times', v_now);
    end if;
    return outbox.complete_events(p_batch, p_fence, coalesce(v_ids, '{}'));
end;
$$;

comment on function outbox.fail_events(bigint, bigint, jsonb) is
'Moves failed events of a batch to retries, from [{"event_id", "error", "outage"?}], and writes audit entries. Each is
due again after the handler''s next delay, plus or minus 20 %; after the last delay it is a dead letter. outage is the
circuit key of the account whose outage failed it. False, and nothing done, if the lease is lost.';

create or replace function outbox.uncount_attempts(
    p_attempts jsonb, p_outage text, p_at timestamptz, out times integer, out attempts jsonb
)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        coalesce(count(*) filter (where listed.is_recent), 0)::integer,
        -- An event that was held before any call has no attempts.
        coalesce(
            jsonb_agg(
                case when listed.is_recent then listed.attempt || '{"counted": false}' else listed.attempt end
                order by listed.n
            ),
            '[]'
        )
    from (
        select
            a.attempt,
            a.n,
            coalesce(a.attempt ->> 'outage' = p_outage, false) and not a.attempt ? 'counted'
            and (a.attempt ->> 'at')::timestamptz > p_at - interval '2 minutes' as is_recent
        from jsonb_array_elements(p_attempts) with ordinality as a (attempt, n)
    ) as listed;
end;

comment on function outbox.uncount_attempts(jsonb, text, timestamptz) is
'The attempts of outbox.retries, of which those that p_outage failed in the two minutes before p_at are marked as not
counted, and their number. p_outage is a circuit''s key.';

create or replace function outbox.release_events(
    p_batch bigint, p_fence bigint, p_event_ids text[], p_after interval, p_cause text, p_reason text,
    p_outage text default null, p_is_held boolean default false
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_batch outbox.batches;
    v_cause outbox.release_causes;
begin
    select c.* into strict v_cause from outbox.release_causes as c where c.cause = p_cause;
    select b.* into v_batch from outbox.batches as b where b.id = p_batch and b.fence = p_fence for update;
    if not found then
        return false;
    end if;
    insert into outbox.retries as r (
        handler, event_id, attempts, due_at, blocked_by, cause, releases, waiting_since
    )
    select
        v_batch.handler, held.event_id,
        case when p_is_held then '[]' else jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
            'at', surety.format_time(v_now), 'worker', v_batch.leased_by, 'error', left(p_reason, 2000),
            'outage', p_outage, 'counted', false))) end,
        v_now + greatest(p_after, v_cause.first_delay), p_outage, p_cause, 1, v_now
    from unnest(v_batch.event_ids) as held (event_id)
    where held.event_id = any(p_event_ids)
    order by held.event_id
    on conflict (handler, event_id) do update
    set
        -- The last twenty, because a provider may be busy for hours. An event that was being handled when its circuit
        -- opened was skipped by surety.open_circuit.
        (failures, attempts) = (
            select
                greatest(0, r.failures - u.times),
                case when jsonb_array_length(u.attempts) >= 20 then u.attempts - 0 else u.attempts end
                    || excluded.attempts
            from outbox.uncount_attempts(
                r.attempts, case when p_cause = 'circuit_open' then p_outage end, v_batch.claimed_at) as u
        ),
        due_at = v_now
            + greatest(p_after, least(v_cause.delay_max, v_cause.first_delay * 2 ^ least(r.releases, 12))),
        blocked_by = excluded.blocked_by,
        cause = excluded.cause,
        releases = least(r.releases, 1000000) + 1,
        waiting_since = coalesce(r.waiting_since, excluded.waiting_since);
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

comment on function outbox.release_events(bigint, bigint, text[], interval, text, text, text, boolean) is
'Moves events of a batch to retries without counting a failure, for a cause of outbox.release_causes. They are due again
after p_after or the cause''s delay, whichever is longer. p_outage is the circuit key of an account in outage.
p_is_held: no call was made, so no attempt is listed. False, and nothing done, if the lease is lost.';
