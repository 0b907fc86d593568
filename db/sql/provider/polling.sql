-- Polling: unfinished objects and lists to read from the provider.

create or replace function surety.claim_payments_to_poll(p_limit integer)
returns table (
    payment_id text, provider_id text, account text, amount_minor bigint, currency text, livemode boolean,
    first_sent_at timestamptz, last_sent_at timestamptz
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select payments.id
        from surety.payments
        where
            payments.poll_at <= surety.time_now()
            and not exists (
                select from surety.circuit_breakers
                where
                    circuit_breakers.provider = payments.provider
                        and circuit_breakers.account = payments.provider_account
                    and circuit_breakers.opened_at is not null
            )
        order by payments.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.payments
        set
            poll_count = payments.poll_count + 1,
            poll_at = surety.time_now() + states.poll_after * least(64, 2 ^ (payments.poll_count + 1))
        from due, surety.states
        where payments.id = due.id and payments.state = states.state
        returning
            payments.id, payments.provider_id, payments.provider_account, payments.amount_minor, payments.currency,
            payments.livemode
    )

    select
        claimed.id,
        claimed.provider_id,
        claimed.provider_account,
        claimed.amount_minor,
        claimed.currency,
        claimed.livemode,
        calls.first_sent_at,
        calls.last_sent_at
    from claimed
    left join surety.calls on claimed.id = calls.payment_id and calls.operation = 'create'
    -- Nothing was sent for it, so there is nothing to ask.
    where claimed.provider_id is not null or calls.payment_id is not null;
end;

comment on function surety.claim_payments_to_poll(integer) is
'Unfinished payments that the sweep should ask their provider about now; each is asked again at growing intervals, up to
64 times the state''s poll_after,
    for as long as it is unfinished. One without provider_id was sent between first_sent_at
and last_sent_at, and nobody knows whether it came there.';

create or replace function surety.claim_refunds_to_poll(p_limit integer)
returns table (
    refund_id text, payment_id text, provider_id text, intent_id text, account text, livemode boolean
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select refunds.id
        from surety.refunds
        where
            refunds.poll_at <= surety.time_now()
            and not exists (
                select from surety.circuit_breakers
                where
                    circuit_breakers.provider = refunds.provider and circuit_breakers.account = refunds.provider_account
                    and circuit_breakers.opened_at is not null
            )
        order by refunds.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.refunds
        set
            poll_count = refunds.poll_count + 1,
            poll_at = surety.time_now() + refund_states.poll_after * least(64, 2 ^ (refunds.poll_count + 1))
        from due, surety.refund_states
        where refunds.id = due.id and refunds.state = refund_states.state
        returning refunds.id, refunds.payment_id, refunds.provider_id, refunds.provider_account
    )

    select
        claimed.id,
        claimed.payment_id,
        claimed.provider_id,
        payments.provider_id,
        claimed.provider_account,
        payments.livemode
    from claimed
    inner join surety.payments on claimed.payment_id = payments.id
    left join surety.calls
        on claimed.payment_id = calls.payment_id and calls.operation = 'refund:' || claimed.id
    -- Nothing was sent for it, so there is nothing to ask.
    where claimed.provider_id is not null or calls.payment_id is not null;
end;

comment on function surety.claim_refunds_to_poll(integer) is
'Refunds under way that the sweep should ask their provider about now, at growing intervals. One without provider_id was
sent, and nobody knows whether it came there: it is among those of the intent, or is not.';

create or replace function surety.claim_disputes_to_poll(p_limit integer)
returns table (payment_id text, provider_id text, account text, livemode boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select disputes.id
        from surety.disputes
        where
            disputes.poll_at <= surety.time_now()
            and not exists (
                select from surety.circuit_breakers
                where
                    circuit_breakers.provider = disputes.provider
                        and circuit_breakers.account = disputes.provider_account
                    and circuit_breakers.opened_at is not null
            )
        order by disputes.poll_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.disputes
        set poll_at = surety.time_now() + dispute_statuses.poll_after
        from due, surety.dispute_statuses
        where disputes.id = due.id and disputes.status = dispute_statuses.status
        returning disputes.payment_id, disputes.provider_id, disputes.provider_account
    )

    select
        claimed.payment_id,
        claimed.provider_id,
        claimed.provider_account,
        environment.livemode
    from claimed
    cross join surety.environment;
end;

comment on function surety.claim_disputes_to_poll(integer) is
'Open disputes and inquiries that the sweep should fetch now, every few hours.';

create or replace function surety.poll_windows(p_list text, p_overlap interval)
returns table (provider text, account text, read_from timestamptz, read_to timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        'stripe',
        accounts.account,
        coalesce(
            poll_cursors.polled_to, (select min(environment.created_at) from surety.environment)
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
            select from surety.circuit_breakers
            where
                circuit_breakers.provider = 'stripe' and circuit_breakers.account = accounts.account
                and circuit_breakers.opened_at is not null
        )
    order by accounts.account;
end;

comment on function surety.poll_windows(text, interval) is
'From when each account''s list must be read again, overlapping, because a list may show a row late; and what to tell
surety.advance_poll_cursor afterwards.';

create or replace function surety.advance_poll_cursor(p_provider text, p_account text, p_list text, p_to timestamptz)
returns void language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.poll_cursors (provider, account, list, polled_to)
    values (p_provider, p_account, p_list, p_to)
    on conflict (provider, account, list) do update
    set polled_to = greatest(poll_cursors.polled_to, excluded.polled_to);
end;

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
                select from surety.circuit_breakers
                where
                    circuit_breakers.provider = pending_money.provider
                        and circuit_breakers.account = pending_money.account
                    and circuit_breakers.opened_at is not null
            )
        order by pending_money.available_at, pending_money.object_id
        limit p_limit
        for update skip locked
    )

    update surety.pending_money
    set available_at = surety.time_now() + p_again_after
    from due
    where
        pending_money.provider = due.provider and pending_money.account = due.account
        and pending_money.object_id = due.object_id
    returning pending_money.provider, pending_money.account, pending_money.object_id, pending_money.created_at;
end;

comment on function surety.claim_pending_money(integer, interval) is
'Balance transactions that should have become available by now; what is asked for and still isn''t comes again later, so
that it keeps no other from being asked for.';
