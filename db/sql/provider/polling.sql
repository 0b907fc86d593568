-- Polling: unfinished objects and lists to read from the provider.

create or replace function surety.poll_delay(p_poll_after interval, p_poll_count integer) returns interval
language sql immutable
begin atomic
    select p_poll_after * 2 ^ (least(greatest(p_poll_count, -1), 5) + 1);
end;

comment on function surety.poll_delay(interval, integer) is
'The time until an object is polled again that was polled p_poll_count times: p_poll_after, doubled each time, at most
64 times as long. Any count is accepted, so that one row can''t stop a claim of many.';

create or replace function surety.claim_objects_to_poll(p_limit integer)
returns table (
    kind text, subject_id text, payment_id text, provider_id text, intent_id text, account text, amount_minor bigint,
    currency text, livemode boolean, first_sent_at timestamptz, last_sent_at timestamptz
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with
    due_payments as (
        select payments.id
        from surety.payments
        where
            payments.poll_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = payments.provider and open_circuits.account = payments.provider_account
            )
        order by payments.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed_payments as (
        update surety.payments
        set
            poll_count = least(payments.poll_count, 1000000) + 1,
            poll_at = surety.time_now() + surety.poll_delay(states.poll_after, payments.poll_count)
        from due_payments, surety.states
        where payments.id = due_payments.id and payments.state = states.state
        returning
            payments.id, payments.provider_id, payments.provider_account, payments.amount_minor, payments.currency,
            payments.livemode
    ),

    due_refunds as (
        select refunds.id
        from surety.refunds
        where
            refunds.poll_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = refunds.provider and open_circuits.account = refunds.provider_account
            )
        order by refunds.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed_refunds as (
        update surety.refunds
        set
            poll_count = least(refunds.poll_count, 1000000) + 1,
            poll_at = surety.time_now() + surety.poll_delay(refund_states.poll_after, refunds.poll_count)
        from due_refunds, surety.refund_states
        where refunds.id = due_refunds.id and refunds.state = refund_states.state
        returning
            refunds.id, refunds.payment_id, refunds.provider_id, refunds.provider_account, refunds.amount_minor,
            refunds.currency
    ),

    due_disputes as (
        select disputes.id
        from surety.disputes
        where
            disputes.poll_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = disputes.provider and open_circuits.account = disputes.provider_account
            )
        order by disputes.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed_disputes as (
        update surety.disputes
        set poll_at = surety.time_now() + dispute_statuses.poll_after
        from due_disputes, surety.dispute_statuses
        where disputes.id = due_disputes.id and disputes.status = dispute_statuses.status
        returning
            disputes.id, disputes.payment_id, disputes.provider_id, disputes.provider_account, disputes.amount_minor,
            disputes.currency
    )

    select
        'payment' as kind,
        claimed_payments.id as subject_id,
        claimed_payments.id as payment_id,
        claimed_payments.provider_id,
        claimed_payments.provider_id as intent_id,
        claimed_payments.provider_account as account,
        claimed_payments.amount_minor,
        claimed_payments.currency,
        claimed_payments.livemode,
        calls.first_sent_at,
        calls.last_sent_at
    from claimed_payments
    left join surety.calls on claimed_payments.id = calls.payment_id and calls.operation = 'create'
    -- A payment that was never sent has nothing to poll.
    where claimed_payments.provider_id is not null or calls.payment_id is not null
    union all
    select
        'refund',
        claimed_refunds.id,
        claimed_refunds.payment_id,
        claimed_refunds.provider_id,
        payments.provider_id,
        claimed_refunds.provider_account,
        claimed_refunds.amount_minor,
        claimed_refunds.currency,
        payments.livemode,
        calls.first_sent_at,
        calls.last_sent_at
    from claimed_refunds
    inner join surety.payments on claimed_refunds.payment_id = payments.id
    left join surety.calls
        on claimed_refunds.payment_id = calls.payment_id and calls.operation = 'refund:' || claimed_refunds.id
    where claimed_refunds.provider_id is not null or calls.payment_id is not null
    union all
    select
        'dispute',
        claimed_disputes.id,
        claimed_disputes.payment_id,
        claimed_disputes.provider_id,
        null,
        claimed_disputes.provider_account,
        claimed_disputes.amount_minor,
        claimed_disputes.currency,
        environment.livemode,
        null,
        null
    from claimed_disputes
    cross join surety.environment;
end;

comment on function surety.claim_objects_to_poll(integer) is
'Unfinished payments, refunds and disputes that are due to be fetched from their provider, at most p_limit of each kind.
Intervals double with each poll of a payment or refund, up to 64 times the state''s poll_after; those of disputes stay
the same. provider_id is null for an object that was sent between first_sent_at and last_sent_at with an unknown
outcome. Objects behind an open circuit are left out.';

create or replace function surety.poll_windows(p_list text, p_overlap interval)
returns table (provider text, account text, read_from timestamptz, read_to timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        'stripe',
        accounts.account,
        -- The cursor is a time of the provider's clock. Ours, at the first reading, may be ahead.
        coalesce(
            poll_cursors.polled_to,
            (select min(environment.created_at) - interval '1 hour' from surety.environment)
        ) - p_overlap,
        surety.time_now()
    from (
        select merchants.provider_account as account from surety.merchants
        union
        select ''
    ) as accounts
    left join surety.poll_cursors
        on poll_cursors.provider = 'stripe' and accounts.account = poll_cursors.account and poll_cursors.list = p_list
    where
        not exists (
            select from surety.open_circuits
            where open_circuits.provider = 'stripe' and open_circuits.account = accounts.account
        )
    order by accounts.account;
end;

comment on function surety.poll_windows(text, interval) is
'The accounts whose list is to be read, without those behind an open circuit. read_from overlaps the last reading,
because a list may show a row late. read_to is the database''s time; surety.advance_poll_cursor takes the provider''s.';

create or replace function surety.advance_poll_cursor(p_provider text, p_account text, p_list text, p_to timestamptz)
returns void language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- The provider lists events of the last thirty days. Older ones are lost unless their webhooks came.
    select
        surety.open_discrepancy(
            'unrecorded', p_provider || '/' || p_account || ':events:' || surety.format_time(poll_cursors.polled_to),
            'critical',
            format(
                'events from %s to %s are not listed any more: what ended before may have changed',
                surety.format_time(poll_cursors.polled_to), surety.format_time(p_to - interval '30 days')
            ),
            jsonb_build_array(
                surety.differing_value(
                    'events', surety.format_time(poll_cursors.polled_to),
                    surety.format_time(p_to - interval '30 days')
                )
            ),
            p_provider || '/' || p_account || ':events', null, surety.time_now()
        )
    from surety.poll_cursors
    where
        poll_cursors.provider = p_provider and poll_cursors.account = p_account and poll_cursors.list = p_list
        and p_list = 'events' and poll_cursors.polled_to < p_to - interval '30 days';

    insert into surety.poll_cursors (provider, account, list, polled_to)
    values (p_provider, p_account, p_list, p_to)
    on conflict (provider, account, list) do update
    set
        polled_to = excluded.polled_to,
        failures = 0,
        failing_since = null,
        error = null,
        is_refused = false;
end;

comment on function surety.advance_poll_cursor(text, text, text, timestamptz) is
'Notes how far an account''s list was read, and that it is readable. The cursor follows
the provider''s clock, also back: then more is read again. Events that are listed no more, after thirty days, are a
critical discrepancy.';

create or replace function surety.note_unreadable_list(
    p_provider text, p_account text, p_list text, p_error text, p_is_refused boolean default false
) returns void language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.poll_cursors (provider, account, list, failures, failing_since, error, is_refused)
    values (p_provider, p_account, p_list, 1, surety.time_now(), left(p_error, 500), p_is_refused)
    on conflict (provider, account, list) do update
    set
        failures = least(poll_cursors.failures, 1000000) + 1,
        failing_since = coalesce(poll_cursors.failing_since, excluded.failing_since),
        error = excluded.error,
        is_refused = excluded.is_refused;
end;

comment on function surety.note_unreadable_list(text, text, text, text, boolean) is
'Notes that an account''s list could not be read to its end, and whether the provider refused it (401, 403). Its cursor
stays.';

create or replace function surety.claim_pending_money(p_limit integer, p_again_after interval)
returns table (provider text, account text, object_id text, created_at timestamptz)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select
            pending_money.provider,
            pending_money.account,
            pending_money.object_id
        from surety.pending_money
        where
            pending_money.available_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = pending_money.provider and open_circuits.account = pending_money.account
            )
        order by pending_money.available_at, pending_money.object_id
        limit p_limit
        for update skip locked
    )

    update surety.pending_money
    set
        available_at = surety.time_now() + surety.poll_delay(p_again_after, pending_money.poll_count - 1),
        poll_count = least(pending_money.poll_count, 1000000) + 1
    from due
    where
        pending_money.provider = due.provider and pending_money.account = due.account
        and pending_money.object_id = due.object_id
    returning pending_money.provider, pending_money.account, pending_money.object_id, pending_money.created_at;
end;

comment on function surety.claim_pending_money(integer, interval) is
'Balance transactions that should be available by now, at most p_limit, without those behind an open circuit. Each is
claimed again until it is available: after p_again_after, then at doubled intervals, at most 64 times as long.';
