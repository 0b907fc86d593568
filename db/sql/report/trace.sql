-- Traces: the history of one payment, from its id.

create or replace function surety.describe_fact(
    p_kind text, p_object_id text, p_amount_minor bigint, p_currency text, p_data jsonb
) returns text
language sql stable parallel safe set search_path = pg_catalog, pg_temp
begin atomic
    select concat_ws(
        ' ',
        case
            when p_kind = 'money'
                then concat_ws(' ', replace(p_data ->> 'category', '_', ' '), surety.format_amount(p_amount_minor,
                    p_currency))
            || ', fee ' || surety.format_amount((p_data ->> 'fee')::bigint, p_currency)
            when p_kind = 'card' then concat_ws(' ', 'card', p_data -> 'card' ->> 'brand', p_data -> 'card' ->> 'last4')
            when p_kind in ('fraud_warning', 'fraud_warning_closed')
                then replace(p_kind, '_', ' ') || ', ' || (p_data ->> 'type')
            when p_kind = 'action' then concat_ws(' by ', 'action', p_data -> 'next_action' ->> 'type')
            when p_kind in ('submitted', 'processing', 'attempt_failed', 'failed', 'canceled')
                then replace(p_kind, '_', ' ')
            else concat_ws(' ', replace(p_kind, '_', ' '), surety.format_amount(p_amount_minor, p_currency))
        end,
        '(' || p_object_id || ')'
    );
end;

comment on function surety.describe_fact(text, text, bigint, text, jsonb) is
'A fact in words: refund failed 25.00 USD (re_1). The amount is in minor units.';

create or replace function surety.trace_payment(p_payment_id text)
returns table (
    at timestamptz, kind text, actor text, summary text, from_state text, to_state text, outcome text,
    duration_ms numeric, data jsonb
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    with
    audited as (
        select
            entries.at,
            -- Entries of one statement have the same time; this order puts causes before effects.
            case entry.kind
                when 'request' then 0
                when 'answer' then 1
                when 'step' then 3
                when 'refund' then 3
                when 'call' then 5
                when 'dead_letter' then 7
                else 6
            end as turn,
            coalesce(to_char(entries.version, 'FM00000'), entries.id) as place,
            case entry.kind when 'answer' then 'call' when 'dead_letter' then 'retry' else entry.kind end as kind,
            entries.actor,
            case entry.kind
                when 'request' then
                    (entries.snapshot ->> 'route')
                    || case
                        when entries.snapshot ->> 'route' = 'POST /v1/payments' then ''
                        else coalesce(
                            ' '
                            || surety.format_amount((entries.snapshot ->> 'amount')::bigint,
                                entries.snapshot ->> 'currency'),
                            ''
                        )
                    end
                    || coalesce(', key sty_…' || api_keys.hint, '')
                    || coalesce(', Idempotency-Key ' || (entries.snapshot ->> 'idempotency_key'), '')
                when 'step' then entries.to_state || coalesce(' by ' || entries.reason, '')
                when 'dispute' then
                    'dispute of ' || surety.format_amount(
                        (entries.snapshot ->> 'amount')::bigint, entries.snapshot ->> 'currency'
                    ) || ' ' || entries.to_state || coalesce(', ' || entries.reason, '')
                when 'refund' then
                    'refund of ' || surety.format_amount(
                        (entries.snapshot ->> 'amount')::bigint, entries.snapshot ->> 'currency'
                    ) || ' ' || entries.to_state || ' (' || (entries.snapshot ->> 'refund') || ')'
                when 'call' then
                    '→ ' || split_part(entries.snapshot ->> 'operation', ':', 1)
                    || coalesce(', key ' || (entries.snapshot ->> 'key'), '')
                when 'answer' then
                    '← ' || split_part(entries.snapshot ->> 'operation', ':', 1) || ' ' || entries.outcome
                    || coalesce(': ' || entries.reason, '')
                when 'retry' then
                    (entries.snapshot ->> 'handler') || ' failed, time ' || (entries.snapshot ->> 'failures')
                    || ': ' || entries.reason
                when 'dead_letter' then 'dead letter of ' || substr(entries.actor, 9) || ': ' || entries.reason
                else concat_ws(' ', entry.kind, entries.outcome, entries.reason)
            end as summary,
            entries.from_state,
            entries.to_state,
            entries.outcome,
            entries.duration_ms,
            entries.snapshot || jsonb_strip_nulls(jsonb_build_object(
                'request_id', entries.request_id, 'address', entries.address, 'version', entries.version
            )) as data
        from audit.entries
        -- The audit entry of a payment's first step is that of its request.
        cross join lateral (
            select case when entries.kind = 'step' and entries.snapshot ? 'route' then 'request' else entries.kind end
                as kind
        ) as entry
        left join surety.api_keys on entry.kind = 'request' and substr(entries.actor, 5) = api_keys.id
        -- No entry is older than the payment's id, so older partitions are not read.
        where entries.payment_id = p_payment_id and entries.id >= 'aud_' || substr(p_payment_id, 5, 11)
    ),

    asserted as (
        select
            coalesce(provider_events.received_at, facts.recorded_at) as at,
            2 as turn,
            facts.id as place,
            facts.source as kind,
            facts.provider as actor,
            case
                when provider_events.id is null then described.fact
                when facts.kind in ('money', 'available') or fact_kinds.family in ('refund', 'dispute', 'warning')
                    then provider_events.type || ' (' || provider_events.event_id || '), '
                        || source.how || ': ' || described.fact
                else provider_events.type || ' (' || provider_events.event_id || '), ' || source.how
            end as summary,
            null::text as from_state,
            null::text as to_state,
            coalesce(facts.disregarded, 'recorded') as outcome,
            null::numeric as duration_ms,
            jsonb_strip_nulls(jsonb_build_object(
                'fact', facts.kind, 'object', facts.object_id, 'amount', facts.amount_minor, 'currency', facts.currency,
                'recorded_at', surety.format_time(facts.recorded_at)
            )) as data
        from surety.facts
        inner join surety.fact_kinds on facts.kind = fact_kinds.kind
        cross join lateral
            surety.describe_fact(facts.kind, facts.object_id, facts.amount_minor, facts.currency,
                facts.data) as described (fact)
        cross join lateral (
            select case facts.source when 'webhook' then 'signature valid' else 'from the list of events' end as how
        ) as source
        left join surety.provider_events on facts.source in ('webhook', 'poll') and facts.source_id = provider_events.id
        where facts.payment_id = p_payment_id and facts.source not in ('response', 'request')
    ),

    paid_out as (
        select
            payouts.created_at as at,
            8 as turn,
            payouts.id as place,
            'payout' as kind,
            payouts.provider as actor,
            'pays out ' || string_agg(payout_lines.line_id, ', ' order by payout_lines.line_id) || ' in '
            || payouts.id || ' of ' || surety.format_amount(payouts.amount_minor, payouts.currency)
            || coalesce(', arrival ' || payouts.arrival_on, '') || coalesce(', trace id ' || payouts.trace_id, '')
            as summary,
            null::text as from_state,
            null::text as to_state,
            payouts.status as outcome,
            null::numeric as duration_ms,
            jsonb_build_object(
                'payout', payouts.id, 'amount', payouts.amount_minor, 'currency', payouts.currency, 'trace_id',
                payouts.trace_id, 'arrival_on', payouts.arrival_on
            ) as data
        from surety.facts
        inner join surety.payout_lines
            on
                facts.provider = payout_lines.provider and facts.account = payout_lines.account
                and facts.object_id = payout_lines.line_id
        inner join surety.payouts
            on
                payout_lines.provider = payouts.provider and payout_lines.account = payouts.account
                and payout_lines.payout_id = payouts.id
        where facts.payment_id = p_payment_id and facts.kind = 'money'
        group by payouts.provider, payouts.account, payouts.id
    ),

    at_bank as (
        select
            bank_line_payouts.matched_at as at,
            9 as turn,
            bank_lines.id as place,
            'bank' as kind,
            'bank' as actor,
            'shows ' || surety.format_amount(bank_lines.amount_minor, bank_lines.currency) || ' for '
            || bank_line_payouts.payout_id || ' on ' || bank_lines.booked_on || ' at the account …'
            || bank_accounts.hint || ' (' || bank_lines.id || ')' as summary,
            null::text as from_state,
            null::text as to_state,
            'recorded' as outcome,
            null::numeric as duration_ms,
            jsonb_build_object(
                'line', bank_lines.id, 'payout', bank_line_payouts.payout_id, 'amount', bank_lines.amount_minor,
                'currency', bank_lines.currency, 'matched_by', bank_line_payouts.matched_by
            ) as data
        from paid_out
        inner join surety.bank_line_payouts
            on paid_out.actor = bank_line_payouts.provider and paid_out.place = bank_line_payouts.payout_id
        inner join surety.bank_lines on bank_line_payouts.line_id = bank_lines.id
        inner join surety.bank_accounts on bank_lines.account_id = bank_accounts.id
    ),

    transferred as (
        select
            postings.at,
            4 as turn,
            postings.id || transfers.leg as place,
            'transfer' as kind,
            'ledger' as actor,
            surety.format_amount(transfers.amount_minor, transfers.currency)
            || ' debit ' || split_part(transfers.debit_account, ':', 1)
            || ', credit ' || split_part(transfers.credit_account, ':', 1) || ' (' || postings.rule || ')' as summary,
            null::text as from_state,
            null::text as to_state,
            'posted' as outcome,
            null::numeric as duration_ms,
            jsonb_build_object(
                'cause', postings.cause, 'rule', postings.rule, 'debit', transfers.debit_account,
                'credit', transfers.credit_account, 'amount', transfers.amount_minor, 'currency', transfers.currency
            ) as data
        from ledger.postings
        inner join ledger.transfers on postings.id = transfers.posting_id
        where postings.payment_id = p_payment_id
    )

    select
        entry.at,
        entry.kind,
        entry.actor,
        entry.summary,
        entry.from_state,
        entry.to_state,
        entry.outcome,
        entry.duration_ms,
        entry.data
    from (
        select * from audited
        union all
        select * from asserted
        union all
        select * from transferred
        union all
        select * from paid_out
        union all
        select * from at_bank
    ) as entry
    order by entry.at, entry.turn, entry.place;
end;

comment on function surety.trace_payment(text) is
'The history of a payment, oldest first: requests, steps, calls, webhooks, transfers, retries.';

create or replace function surety.list_waits_of_payment(p_payment_id text) returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    select
        case
            when retries.cause is not null
                then retries.handler || ' waits since ' || surety.format_time(retries.waiting_since) || ': '
                || release_causes.meaning
            else retries.handler || ' failed, time ' || retries.failures
                || coalesce(', next attempt at ' || surety.format_time(retries.due_at), '')
        end
    from outbox.retries
    inner join outbox.events on retries.event_id = events.id
    left join outbox.release_causes on retries.cause = release_causes.cause
    where
        -- No event is older than its payment.
        retries.event_id >= 'evt_' || substr(p_payment_id, 5, 11)
        and coalesce(events.payload ->> 'payment_id', events.aggregate_id) = p_payment_id
    order by retries.handler, retries.event_id;
end;

comment on function surety.list_waits_of_payment(text) is
'What the events of a payment, its refunds and its disputes wait for, if they were given back or failed: a line each.';

create or replace function surety.payment_summary(p_payment_id text)
returns table (
    amount text, amount_minor bigint, currency text, state text, merchant text, reference text, provider_id text,
    charges bigint, refunds bigint, disputes bigint, steps integer, transfers bigint, still_open text[]
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        surety.format_amount(payments.amount_minor, payments.currency),
        payments.amount_minor,
        payments.currency,
        payments.state,
        merchants.name,
        payments.reference,
        payments.provider_id,
        counts.charges,
        counts.refunds - counts.refunds_undone,
        counts.disputes,
        payments.version,
        (
            select count(*)
            from ledger.postings
            inner join ledger.transfers on postings.id = transfers.posting_id
            where postings.payment_id = payments.id
        ),
        array(
            select expectations.kind || ' expected by ' || surety.format_time(expectations.due_at)
            from surety.expectations
            where expectations.payment_id = payments.id and expectations.met_at is null
            union all
            select surety.format_amount(payments.refund_pending_minor, payments.currency) || ' to be refunded'
            where payments.refund_pending_minor > 0
            union all
            select 'evidence due by ' || surety.format_time(disputes.evidence_due_at)
            from surety.disputes
            inner join surety.dispute_statuses on disputes.status = dispute_statuses.status
            where
                disputes.payment_id = payments.id and disputes.submit_asked_at is null
                and dispute_statuses.takes_evidence and disputes.evidence_due_at is not null
            union all
            select surety.format_amount(payments.at_risk_minor, payments.currency) || ' disputed'
            where payments.at_risk_minor > 0
            union all
            select 'fraud warning, ' || (payments.fraud_warning ->> 'type') || ': a refund may avoid a dispute'
            where (payments.fraud_warning ->> 'actionable')::boolean
            union all
            select waiting.what
            from surety.list_waits_of_payment(payments.id) as waiting (what)
            union all
            select 'not sent yet: it waits for a worker'
            where
                payments.state = 'initiated'
                and not exists (select from surety.list_waits_of_payment(payments.id))
            union all
            select 'dead letter of ' || dead_letters.handler
            from outbox.dead_letters
            where dead_letters.payment_id = payments.id and dead_letters.closed_at is null
            union all
            select 'discrepancy: ' || discrepancies.kind
            from surety.discrepancies
            where discrepancies.payment_id = payments.id and discrepancies.closed_at is null
        )
    from surety.payments
    inner join surety.merchants on payments.merchant_id = merchants.id
    cross join lateral (
        select
            count(*) filter (where facts.kind = 'captured') as charges,
            count(distinct facts.object_id) filter (where fact_kinds.family = 'refund') as refunds,
            count(distinct facts.object_id) filter (where facts.kind in ('refund_failed', 'refund_canceled'))
                as refunds_undone,
            count(distinct facts.object_id) filter (where fact_kinds.family = 'dispute') as disputes
        from surety.facts
        inner join surety.fact_kinds on facts.kind = fact_kinds.kind
        where facts.payment_id = payments.id
    ) as counts
    where payments.id = p_payment_id;
end;

comment on function surety.payment_summary(text) is
'A payment as one row, with its pending work and open problems. No row for an unknown id.';
