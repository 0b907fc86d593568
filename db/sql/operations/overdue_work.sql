-- Overdue work: failing periodic jobs, unreadable lists, and objects that stay unfinished for too long.

create or replace function surety.record_periodic_job(p_job text, p_every interval, p_error text) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.periodic_jobs (job, every, first_run_at, succeeded_at, failures, failing_since, error)
    values (
        p_job, p_every, surety.time_now(),
        case when p_error is null then surety.time_now() end,
        case when p_error is null then 0 else 1 end,
        case when p_error is not null then surety.time_now() end,
        left(p_error, 500)
    )
    on conflict (job) do update
    set
        every = excluded.every,
        succeeded_at = coalesce(excluded.succeeded_at, periodic_jobs.succeeded_at),
        failures = case when p_error is null then 0 else least(periodic_jobs.failures, 1000000) + 1 end,
        failing_since = case when p_error is not null then coalesce(periodic_jobs.failing_since, surety.time_now()) end,
        error = excluded.error
    where
        p_error is not null or periodic_jobs.failures > 0 or periodic_jobs.every <> excluded.every
        or periodic_jobs.succeeded_at < surety.time_now() - interval '10 seconds'
        -- A test database's clock can be set back.
        or periodic_jobs.succeeded_at > surety.time_now();
end;

comment on function surety.record_periodic_job(text, interval, text) is
'Records the end of a periodic job that runs every p_every; p_error is null if it succeeded. A further success within
ten seconds writes nothing.';

create or replace function surety.list_overdue_jobs()
returns table (job text, failures integer, error text, seconds double precision)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        periodic_jobs.job,
        periodic_jobs.failures,
        periodic_jobs.error,
        extract(
            epoch from surety.time_now() - coalesce(
                periodic_jobs.failing_since, periodic_jobs.succeeded_at, periodic_jobs.first_run_at
            )
        )::double precision
    from surety.periodic_jobs
    where
        periodic_jobs.failures > 1
        or coalesce(periodic_jobs.succeeded_at, periodic_jobs.first_run_at)
        < surety.time_now() - 3 * periodic_jobs.every - interval '5 minutes'
    order by periodic_jobs.job;
end;

comment on function surety.list_overdue_jobs() is
'The periodic jobs that failed more than once in a row, with the seconds since the first failure, and those that have
not succeeded for three of their intervals and five minutes, with the seconds since their last success.';

create or replace function surety.list_unreadable_lists()
returns table (
    provider text, account text, list text, failures integer, error text, is_refused boolean, seconds double precision
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        poll_cursors.provider,
        poll_cursors.account,
        poll_cursors.list,
        poll_cursors.failures,
        poll_cursors.error,
        poll_cursors.is_refused,
        extract(epoch from surety.time_now() - poll_cursors.failing_since)::double precision
    from surety.poll_cursors
    where
        poll_cursors.failures > 0
        and not exists (
            select from surety.open_circuits
            where open_circuits.provider = poll_cursors.provider and open_circuits.account = poll_cursors.account
        )
    order by poll_cursors.failing_since, poll_cursors.provider, poll_cursors.account, poll_cursors.list
    limit 100;
end;

comment on function surety.list_unreadable_lists() is
'The lists of the provider whose last reading did not reach the end, with the seconds since the first such reading. The
100 that have failed longest, without those behind an open circuit, which are not read.';

create or replace function surety.list_overdue_objects()
returns table (
    kind text, state text, count bigint, first text, payment_id text, limit_seconds double precision,
    seconds double precision
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    -- The partial indexes on poll_at hold exactly the unfinished objects.
    with unfinished as (
        select
            'payment' as kind,
            payments.state,
            payments.id,
            payments.id as payment_id,
            payments.updated_at as since,
            -- A bank's network needs days.
            case when payments.rail = 'ach' then greatest(states.overdue_after, '14 days') else states.overdue_after end
            as overdue_after
        from surety.payments
        inner join surety.states on payments.state = states.state
        where payments.poll_at is not null
        union all
        select
            'refund',
            refunds.state,
            refunds.id,
            refunds.payment_id,
            refunds.updated_at,
            case when refunds.provider_id is null then interval '1 hour' else refund_states.overdue_after end
        from surety.refunds
        inner join surety.refund_states on refunds.state = refund_states.state
        where refunds.poll_at is not null
        union all
        select
            'dispute',
            disputes.status,
            disputes.id,
            disputes.payment_id,
            disputes.created_at,
            dispute_statuses.overdue_after
        from surety.disputes
        inner join surety.dispute_statuses on disputes.status = dispute_statuses.status
        where disputes.poll_at is not null
    )

    select
        unfinished.kind,
        unfinished.state,
        count(*),
        (array_agg(unfinished.id order by unfinished.since, unfinished.id))[1],
        (array_agg(unfinished.payment_id order by unfinished.since, unfinished.id))[1],
        extract(epoch from min(unfinished.overdue_after))::double precision,
        extract(epoch from surety.time_now() - min(unfinished.since))::double precision
    from unfinished
    where unfinished.since < surety.time_now() - unfinished.overdue_after
    group by unfinished.kind, unfinished.state
    order by unfinished.kind, unfinished.state;
end;

comment on function surety.list_overdue_objects() is
'The unfinished payments, refunds and disputes that are older than their state''s overdue_after, by kind and state: how
many, the oldest one, its payment and its age. A payment or refund is as old as its last change, a dispute as its
creation. A refund without an id at the provider is overdue after an hour.';

create or replace function surety.find_silent_webhooks() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Events of the provider's list have no headers. The last two hundred events are enough, and quick to find.
    with recent as (
        select
            provider_events.received_at,
            provider_events.headers = '{}' as is_polled
        from surety.provider_events
        order by provider_events.id desc
        limit 200
    ),

    received as (
        select max(recent.received_at) as last_at from recent where not recent.is_polled
    )

    select
        jsonb_build_object(
            'polled', count(*),
            'seconds', round(extract(epoch from surety.time_now() - min(recent.received_at)), 3),
            'last_seconds', round(extract(epoch from surety.time_now() - min(received.last_at)), 3)
        )
    from recent cross join received
    where recent.is_polled and (received.last_at is null or recent.received_at > received.last_at);
end;

comment on function surety.find_silent_webhooks() is
'The events of the provider that were found by polling since the last webhook: {"polled": their number, at most 200,
"seconds": the age of the first, "last_seconds": the age of that webhook, null if none is among the last 200 events}.';

create or replace function surety.list_waiting_events()
returns table (
    cause text, meaning text, finding text, count bigint, first text, payment_id text, seconds double precision,
    account text, error text
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with given_back as (
        select
            retries.cause,
            retries.event_id,
            retries.waiting_since,
            retries.attempts -> -1 ->> 'error' as error,
            refused.account
        from outbox.retries
        left join lateral (
            select coalesce(payments.provider_account, merchants.provider_account, provider_events.account) as account
            from outbox.events
            left join surety.payments on events.aggregate_id = payments.id
            left join surety.merchants on events.merchant_id = merchants.id
            left join surety.provider_events on events.aggregate_id = provider_events.id
            where events.id = retries.event_id and retries.cause = 'access_refused'
        ) as refused on true
        where retries.cause is not null
    ),

    waiting as (
        select
            given_back.cause,
            given_back.account,
            count(*) as count,
            min(given_back.waiting_since) as since,
            (array_agg(given_back.event_id order by given_back.waiting_since, given_back.event_id))[1] as first,
            (array_agg(given_back.error order by given_back.waiting_since, given_back.event_id))[1] as error
        from given_back
        group by given_back.cause, given_back.account
    )

    select
        waiting.cause,
        release_causes.meaning,
        release_causes.finding,
        waiting.count,
        waiting.first,
        case events.aggregate_type when 'payment' then events.aggregate_id else events.payload ->> 'payment_id' end,
        extract(epoch from surety.time_now() - waiting.since)::double precision,
        waiting.account,
        waiting.error
    from waiting
    inner join outbox.release_causes on waiting.cause = release_causes.cause
    left join outbox.events on waiting.first = events.id
    order by waiting.since, waiting.cause, waiting.account;
end;

comment on function surety.list_waiting_events() is
'The events that were given back uncounted, by their last cause, refused ones by account as well: how many, the one that
has waited longest, its payment, how long and its last error. finding is the finding that reports them.';
