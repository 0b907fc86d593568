-- Payouts of the provider to our bank: as last reported, and with the balance transactions that each pays out.

create or replace function surety.payout_rank(p_status text) returns integer
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(
        (select payout_statuses.rank from surety.payout_statuses where payout_statuses.status = p_status), 0
    );
end;

comment on function surety.payout_rank(text) is
'How far a payout with this status has come: of two reports the higher one stands. 0 for an unknown status.';

create or replace function surety.record_payouts(p_facts jsonb, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- A payout is reported several times, in any order: the highest status stands, and known values are kept.
declare
    v_fact record;
    v_before surety.payouts;
    v_after surety.payouts;
begin
    for v_fact in
        select
            f.*,
            coalesce(f.data ->> 'status', case f.kind when 'payout_failed' then 'failed' else 'pending' end) as status,
            to_timestamp((f.data ->> 'arrival_date')::bigint) at time zone 'UTC' as arrival
        from jsonb_array_elements(p_facts) as e (fact)
        cross join lateral jsonb_to_record(e.fact) as f (
            provider text, account text, livemode boolean, object_id text, kind text, amount_minor bigint,
            currency text, data jsonb, occurred_at timestamptz
        )
        where f.kind in ('payout', 'payout_failed')
        order by f.provider, f.account, f.object_id
    loop
        select p.* into v_before from surety.payouts as p
        where p.provider = v_fact.provider and p.account = v_fact.account and p.id = v_fact.object_id
        for update;
        perform surety.open_discrepancy(
            case when v_before.currency <> v_fact.currency then 'currency' else 'amount' end,
            v_fact.object_id || ':payout', 'critical',
            format('%s is known with %s, now reported with %s', v_fact.object_id,
                surety.format_amount(v_before.amount_minor, v_before.currency),
                surety.format_amount(v_fact.amount_minor, v_fact.currency)),
            jsonb_path_query_array(
                jsonb_build_array(
                    surety.differing_amount('amount', v_before.amount_minor, v_fact.amount_minor),
                    surety.differing_value('currency', v_before.currency, v_fact.currency)),
                '$[*] ? (@.here != @.there)'),
            v_before.id, v_fact.object_id, p_at, p_currency => v_before.currency,
            p_data => jsonb_build_object('received', to_jsonb(v_fact), 'known', to_jsonb(v_before)))
        where (v_before.amount_minor, v_before.currency) <> (v_fact.amount_minor, v_fact.currency);

        insert into surety.payouts as p (
            provider, account, id, livemode, amount_minor, currency, status, was_paid, is_automatic,
            reconciliation_status, trace_id, arrival_on, failure_code, created_at, recorded_at, poll_at, lines_due_at
        )
        values (
            v_fact.provider, v_fact.account, v_fact.object_id, v_fact.livemode, v_fact.amount_minor, v_fact.currency,
            v_fact.status, v_fact.status = 'paid', (v_fact.data ->> 'automatic')::boolean,
            v_fact.data ->> 'reconciliation_status', v_fact.data ->> 'trace_id', v_fact.arrival::date,
            v_fact.data ->> 'failure_code', v_fact.occurred_at, p_at, p_at, null
        )
        on conflict (provider, account, id) do update
        set status = case
                when surety.payout_rank(excluded.status) > surety.payout_rank(p.status) then excluded.status
                else p.status
            end,
            was_paid = p.was_paid or excluded.was_paid,
            is_automatic = coalesce(excluded.is_automatic, p.is_automatic),
            reconciliation_status = case
                when p.reconciliation_status = 'completed' then p.reconciliation_status
                else coalesce(excluded.reconciliation_status, p.reconciliation_status)
            end,
            trace_id = coalesce(excluded.trace_id, p.trace_id),
            arrival_on = coalesce(excluded.arrival_on, p.arrival_on),
            failure_code = coalesce(excluded.failure_code, p.failure_code)
        returning * into v_after;

        -- Fetched again while it may change: a trace id comes up to ten days after the arrival, a failure within days.
        update surety.payouts as p
        set poll_at = case
                when p_at > greatest(p.created_at, p.arrival_on::timestamptz) + interval '14 days' then null
                else p_at + (select s.poll_after from surety.payout_statuses as s where s.status = p.status)
            end,
            -- Only of an automatic payout does the provider know which balance transactions it pays out.
            lines_due_at = case
                when p.lines_due_at is null and p.lines_read_at is null and p.is_automatic
                    and p.reconciliation_status = 'completed' then p_at
                else p.lines_due_at
            end
        where p.provider = v_after.provider and p.account = v_after.account and p.id = v_after.id;

        perform surety.open_discrepancy(
            'state', v_after.id, 'critical',
            format('payout %s of %s failed%s: %s; the money is back in the balance', v_after.id,
                surety.format_amount(v_after.amount_minor, v_after.currency),
                case when v_after.was_paid then ' after it was paid' else '' end,
                coalesce(v_after.failure_code, 'no reason given')),
            jsonb_build_array(surety.differing_value('status', v_before.status, v_after.status)),
            v_after.id, v_after.id, p_at, p_currency => v_after.currency, p_data => to_jsonb(v_after))
        where v_after.status = 'failed' and v_before.status is distinct from 'failed';
    end loop;
end;
$$;

comment on function surety.record_payouts(jsonb, timestamptz) is
'Records the payouts among facts: status, trace id, arrival. A failed payout, and one with another amount or currency
than before, open a critical discrepancy. An automatic payout whose balance transactions the provider has assigned is
due to be read.';

create or replace function surety.claim_payouts_to_poll(p_limit integer default 100)
returns table (account text, payout_id text, livemode boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select
            payouts.provider,
            payouts.account,
            payouts.id
        from surety.payouts
        where
            payouts.poll_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = payouts.provider and open_circuits.account = payouts.account
            )
        order by payouts.poll_at, payouts.id
        limit p_limit
        for update skip locked
    )

    update surety.payouts
    set
        poll_at = case
            when
                surety.time_now()
                > greatest(payouts.created_at, payouts.arrival_on::timestamptz) + interval '14 days' then null
            else surety.time_now() + coalesce(
                (
                    select payout_statuses.poll_after from surety.payout_statuses
                    where payout_statuses.status = payouts.status
                ),
                interval '1 hour'
            )
        end
    from due
    where payouts.provider = due.provider and payouts.account = due.account and payouts.id = due.id
    returning payouts.account, payouts.id, payouts.livemode;
end;

comment on function surety.claim_payouts_to_poll(integer) is
'Payouts that may have changed unreported and are due to be fetched, at most p_limit, without those behind an open
circuit. None is fetched later than 14 days after its arrival.';

create or replace function surety.claim_payout_lines(p_limit integer default 20)
returns table (account text, payout_id text, created_at timestamptz)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select
            payouts.provider,
            payouts.account,
            payouts.id
        from surety.payouts
        where
            payouts.lines_due_at <= surety.time_now()
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = payouts.provider and open_circuits.account = payouts.account
            )
        order by payouts.lines_due_at, payouts.id
        limit p_limit
        for update skip locked
    )

    update surety.payouts
    set lines_due_at = surety.time_now() + interval '10 minutes'
    from due
    where payouts.provider = due.provider and payouts.account = due.account and payouts.id = due.id
    returning payouts.account, payouts.id, payouts.created_at;
end;

comment on function surety.claim_payout_lines(integer) is
'Payouts whose balance transactions are to be read, at most p_limit, without those behind an open circuit. One whose
reading does not end is claimed again after ten minutes.';

create or replace function surety.record_payout_lines(p_account text, p_payout_id text, p_lines jsonb) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_count integer;
begin
    insert into surety.payout_lines (provider, account, line_id, payout_id, category, net_minor, currency)
    select 'stripe', p_account, l.id, p_payout_id, l.category, l.net, l.currency
    from jsonb_to_recordset(p_lines) as l (id text, category text, net bigint, currency text)
    order by l.id
    on conflict (provider, account, line_id) do nothing;
    get diagnostics v_count = row_count;
    if v_count < jsonb_array_length(p_lines) then
        perform surety.open_discrepancy(
            'duplicate', k.line_id || ':payout', 'critical',
            format('%s is paid out by %s and by %s', k.line_id, k.payout_id, p_payout_id),
            jsonb_build_array(surety.differing_value('payout', k.payout_id, p_payout_id)),
            k.payout_id, p_payout_id, surety.time_now(), p_currency => k.currency)
        from jsonb_to_recordset(p_lines) as l (id text)
        join surety.payout_lines as k
            on k.provider = 'stripe' and k.account = p_account and k.line_id = l.id and k.payout_id <> p_payout_id
        order by k.line_id;
    end if;
    return v_count;
end;
$$;

comment on function surety.record_payout_lines(text, text, jsonb) is
'Records that a payout pays out these balance transactions, [{"id", "category", "net", "currency"}]; returns how many
were new. One that another payout paid out before is a critical discrepancy, and stays with that.';

create or replace function surety.end_payout_lines(p_account text, p_payout_id text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_payout surety.payouts;
    v_fits boolean;
begin
    update surety.payouts as p
    set lines_read_at = v_now, line_count = l.line_count, lines_minor = l.minor
    from (
        -- The list has the payout's own line too, which takes the amount off the balance.
        select count(*)::integer as line_count, coalesce(sum(k.net_minor), 0)::bigint as minor
        from surety.payout_lines as k
        where k.provider = 'stripe' and k.account = p_account and k.payout_id = p_payout_id and k.category <> 'payout'
    ) as l
    where p.provider = 'stripe' and p.account = p_account and p.id = p_payout_id
    returning p.* into v_payout;
    v_fits := v_payout.lines_minor = v_payout.amount_minor and not exists (
        select from surety.payout_lines as k
        where k.provider = 'stripe' and k.account = p_account and k.payout_id = p_payout_id
            and k.currency <> v_payout.currency
    );
    -- A list that doesn't add up is read again: it may have been incomplete.
    update surety.payouts as p
    set lines_due_at = case when v_fits then null else v_now + interval '1 hour' end
    where p.provider = 'stripe' and p.account = p_account and p.id = p_payout_id;
    if not v_fits then
        perform surety.open_discrepancy(
            'amount', p_payout_id || ':lines', 'critical',
            format('%s pays out %s, the nets of its %s balance transactions add up to %s', p_payout_id,
                surety.format_amount(v_payout.amount_minor, v_payout.currency), v_payout.line_count,
                surety.format_amount(v_payout.lines_minor, v_payout.currency)),
            jsonb_path_query_array(
                jsonb_build_array(
                    surety.differing_amount('sum of balance transactions', v_payout.lines_minor, v_payout.amount_minor),
                    surety.differing_value('currency', v_payout.currency, (
                        select string_agg(distinct k.currency, ', ' order by k.currency) from surety.payout_lines as k
                        where k.provider = 'stripe' and k.account = p_account and k.payout_id = p_payout_id
                    ))),
                '$[*] ? (@.here != @.there)'),
            p_payout_id, p_payout_id, v_now, p_currency => v_payout.currency, p_data => to_jsonb(v_payout));
    else
        perform surety.close_discrepancies(
            'amount', array[p_payout_id || ':lines'], 'the balance transactions add up', v_now);
    end if;
    return v_fits;
end;
$$;

comment on function surety.end_payout_lines(text, text) is
'Ends the reading of a payout''s balance transactions: returns whether the sum of their nets is the payout''s amount. If
not, that is a critical discrepancy until a later reading fits.';
