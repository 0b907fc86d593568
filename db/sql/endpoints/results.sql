-- Results of deliveries: the log, retries, and endpoints that are slowed down or disabled.

create or replace function outbox.delivery_delay(p_failures integer) returns interval
language sql volatile
begin atomic
    select (
        (
            array[
                '5 seconds', '5 minutes', '30 minutes', '2 hours', '5 hours', '10 hours', '14 hours', '20 hours',
                '24 hours'
            ]
        )[p_failures]
    )::interval * (0.9 + random() * 0.2);
end;

comment on function outbox.delivery_delay(integer) is
'The delay after so many failed attempts of a delivery, within 10 %; null after the last: the delivery is given up.';

create or replace function outbox.failure_percent(
    p_failing_since timestamptz, p_failed_attempts integer, p_at timestamptz
) returns integer
language sql immutable
begin atomic
    select coalesce(
        floor(100 * least(
            1, extract(epoch from p_at - p_failing_since) / (5 * 86400), p_failed_attempts / 20.0
        )), 0)::integer;
end;

comment on function outbox.failure_percent(timestamptz, integer, timestamptz) is
'How far an endpoint is on its way to being disabled, in percent. It is disabled after five days without a success, if
at least 20 attempts have been completed in them: an outage of the sender counts nothing, and neither do few events.';

create or replace function outbox.note_endpoint_results(p_results jsonb, p_worker text, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_probed_after constant integer := 5;
    v_counted record;
    v_endpoint outbox.webhook_endpoints;
    v_percent integer;
    v_notice integer;
begin
    for v_counted in
        select
            r.endpoint_id, count(*) filter (where r.outcome = 'failed')::integer as failed,
            bool_or(r.outcome = 'delivered') as has_success, bool_or(r.status = 410) as is_gone,
            max(least(r.retry_after, 86400)) filter (where r.retry_after is not null) as retry_after
        from jsonb_to_recordset(p_results) as r (
            endpoint_id text, outcome text, status integer, retry_after double precision)
        group by r.endpoint_id
        order by r.endpoint_id
    loop
        -- An endpoint that is well, and was well before, is not written.
        update outbox.webhook_endpoints as w
        set
            failing_since = case
                when v_counted.has_success then null
                when v_counted.failed > 0 then coalesce(w.failing_since, p_at)
                else w.failing_since
            end,
            failed_attempts = case when v_counted.has_success then 0 else w.failed_attempts + v_counted.failed end,
            noticed_percent = case when v_counted.has_success then 0 else w.noticed_percent end,
            not_before = case
                when v_counted.retry_after is not null then p_at + make_interval(secs => v_counted.retry_after)
                when v_counted.has_success or v_counted.failed = 0 then null
                when w.failed_attempts + v_counted.failed >= v_probed_after
                    then p_at + least(300, 2 ^ least(w.failed_attempts + v_counted.failed - v_probed_after, 10))
                    * (0.9 + random() * 0.2) * interval '1 second'
            end
        where w.id = v_counted.endpoint_id
            and (
                v_counted.failed > 0 or w.failed_attempts > 0 or w.not_before is not null
                or v_counted.retry_after is not null
            )
        returning w.* into v_endpoint;
        continue when not found or v_counted.failed = 0 or v_endpoint.disabled_at is not null;
        if v_counted.is_gone then
            perform outbox.disable_endpoint(v_endpoint.id, 'gone', 'worker:' || p_worker);
            continue;
        end if;
        v_percent := outbox.failure_percent(v_endpoint.failing_since, v_endpoint.failed_attempts, p_at);
        select max(n.percent) into v_notice from unnest(array[50, 70, 90, 100]) as n (percent)
        where n.percent <= v_percent;
        if v_notice > v_endpoint.noticed_percent then
            update outbox.webhook_endpoints as w set noticed_percent = v_notice where w.id = v_endpoint.id;
            perform outbox.audit_endpoint(v_endpoint, 'worker:' || p_worker, 'webhook endpoint fails',
                jsonb_build_object(
                    'percent', v_notice, 'failing_since', surety.format_time(v_endpoint.failing_since),
                    'attempts', v_endpoint.failed_attempts));
            if v_notice = 100 then
                perform outbox.disable_endpoint(v_endpoint.id, 'failures', 'worker:' || p_worker);
            end if;
        end if;
    end loop;
end;
$$;

comment on function outbox.note_endpoint_results(jsonb, text, timestamptz) is
'Notes at each endpoint whether its deliveries succeed: Retry-After slows it down, five failures in a row have it probed
with one event at growing intervals, 410 disables it, and so does outbox.failure_percent, after audited notices at 50,
70, 90 and 100 percent.';

create or replace function outbox.record_deliveries(p_worker text, p_results jsonb) returns bigint[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Locks endpoints, then batches, in order.
declare
    v_attempts_max constant integer := 9;
    v_at timestamptz := surety.time_now();
    v_held bigint [];
    v_results jsonb;
begin
    perform from outbox.webhook_endpoints as w
    where w.id in (select r.value ->> 'endpoint_id' from jsonb_array_elements(p_results) as r)
    order by w.id for no key update;
    v_held := array(
        select b.fence from outbox.delivery_batches as b
        where b.fence in (select (r.value ->> 'fence')::bigint from jsonb_array_elements(p_results) as r)
        order by b.endpoint_id for update
    );
    -- An event of a held batch without a result is released. A success without its batch is logged, and nothing else.
    select jsonb_agg(to_jsonb(read)) into v_results
    from (
        select
            b.endpoint_id, b.fence, held.event_id, coalesce(r.outcome, 'released') as outcome, r.status, r.error,
            r.answer, r.duration_ms, r.retry_after, r.pause_seconds, coalesce(t.failures, 0) + 1 as attempt
        from outbox.delivery_batches as b
        cross join lateral unnest(b.event_ids) as held (event_id)
        left join jsonb_to_recordset(p_results) as r (
            fence bigint, event_id text, outcome text, status integer, error text, answer text, duration_ms integer,
            retry_after double precision, pause_seconds double precision
        ) on r.fence = b.fence and r.event_id = held.event_id
        left join outbox.delivery_retries as t on t.endpoint_id = b.endpoint_id and t.event_id = held.event_id
        where b.fence = any(v_held)
        union all
        select
            r.endpoint_id, null, r.event_id, 'late', r.status, null, null, r.duration_ms, null, null, 1
        from jsonb_to_recordset(p_results) as r (
            endpoint_id text, fence bigint, event_id text, outcome text, status integer, duration_ms integer)
        where r.fence <> all(v_held) and r.outcome = 'delivered'
    ) as read;
    if v_results is null then
        return v_held;
    end if;
    insert into outbox.delivery_attempts (
        id, endpoint_id, event_id, outcome, attempt, status, error, answer, duration_ms
    )
    select
        surety.new_id('dat', v_at), r.endpoint_id, r.event_id, r.outcome, r.attempt, r.status, r.error, r.answer,
        r.duration_ms
    from jsonb_to_recordset(v_results) as r (
        endpoint_id text, event_id text, outcome text, attempt smallint, status smallint, error text, answer text,
        duration_ms integer)
    where r.outcome <> 'released'
    order by r.endpoint_id, r.event_id;
    delete from outbox.delivery_retries as t
    using jsonb_to_recordset(v_results) as r (endpoint_id text, event_id text, outcome text)
    where t.endpoint_id = r.endpoint_id and t.event_id = r.event_id and r.outcome in ('delivered', 'skipped');
    insert into outbox.delivery_retries as t (endpoint_id, event_id, failures, due_at)
    select
        r.endpoint_id, r.event_id, case when r.outcome = 'failed' then 1 else 0 end,
        v_at + case
            when r.outcome = 'failed' then outbox.delivery_delay(1)
            else make_interval(secs => coalesce(r.pause_seconds, 0))
        end
    from jsonb_to_recordset(v_results) as r (
        endpoint_id text, event_id text, outcome text, pause_seconds double precision)
    where r.outcome in ('failed', 'released')
    order by r.endpoint_id, r.event_id
    on conflict (endpoint_id, event_id) do update
    set
        failures = t.failures + excluded.failures,
        due_at = case
            when excluded.failures = 0 then excluded.due_at
            else v_at + outbox.delivery_delay(t.failures + 1)
        end,
        given_up_at = case when excluded.failures > 0 and t.failures >= v_attempts_max then v_at end;
    delete from outbox.delivery_batches as b where b.fence = any(v_held);
    insert into outbox.delivery_hours as h (endpoint_id, hour, delivered, failed, skipped, milliseconds)
    select
        r.endpoint_id, date_trunc('hour', v_at, 'UTC'),
        count(*) filter (where r.outcome = 'delivered'), count(*) filter (where r.outcome = 'failed'),
        count(*) filter (where r.outcome = 'skipped'), coalesce(sum(r.duration_ms), 0)
    from jsonb_to_recordset(v_results) as r (endpoint_id text, outcome text, duration_ms integer)
    where r.outcome not in ('released', 'late')
    group by r.endpoint_id
    order by r.endpoint_id
    on conflict (endpoint_id, hour) do update
    set
        delivered = h.delivered + excluded.delivered, failed = h.failed + excluded.failed,
        skipped = h.skipped + excluded.skipped, milliseconds = h.milliseconds + excluded.milliseconds;
    perform outbox.note_endpoint_results(v_results, p_worker, v_at);
    return v_held;
end;
$$;

comment on function outbox.record_deliveries(text, jsonb) is
'Records the results of batches, each an object: endpoint_id, fence, event_id, outcome (delivered, failed, skipped,
released), status, error, answer, duration_ms, retry_after and pause_seconds. A batch ends with its results. Returns the
fences of the batches that were still held; of the others only successes are logged, as late.';

create or replace function outbox.publish_sealing_key(p_id text, p_public_key bytea) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into outbox.sealing_keys as known (id, public_key, published_at)
    values (p_id, p_public_key, surety.time_now())
    on conflict (id) do update set published_at = excluded.published_at
    where known.published_at < excluded.published_at - interval '1 hour' or known.id <> (
        select newest.id from outbox.sealing_keys as newest order by newest.published_at desc, newest.id desc limit 1
    );
end;

comment on function outbox.publish_sealing_key(text, bytea) is
'Publishes the public key of a worker''s SURETY_WEBHOOK_KEY. New signing secrets are encrypted for the last one.';
