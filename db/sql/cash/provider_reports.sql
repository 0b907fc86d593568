-- The provider's own reports, compared with our records: rows that differ, rows unknown here, records absent there.

create or replace function surety.known_money(p_account text)
returns table (
    id text, payment_id text, gross_minor bigint, fee_minor bigint, net_minor bigint, currency text, category text,
    created_at timestamptz, record_id text
)
language sql stable
begin atomic
    -- No set clause, so that PostgreSQL inlines the function and joins it with the rows of a report.
    select
        facts.object_id,
        facts.payment_id,
        facts.amount_minor,
        (facts.data ->> 'fee')::bigint,
        (facts.data ->> 'net')::bigint,
        facts.currency,
        facts.data ->> 'category',
        facts.occurred_at,
        facts.id
    from surety.facts
    where facts.provider = 'stripe' and facts.account = p_account and facts.kind = 'money'
    union all
    select
        unmatched_facts.object_id,
        null,
        (unmatched_facts.fact ->> 'amount_minor')::bigint,
        (unmatched_facts.fact -> 'data' ->> 'fee')::bigint,
        (unmatched_facts.fact -> 'data' ->> 'net')::bigint,
        unmatched_facts.fact ->> 'currency',
        unmatched_facts.fact -> 'data' ->> 'category',
        (unmatched_facts.fact ->> 'occurred_at')::timestamptz,
        unmatched_facts.id
    from surety.unmatched_facts
    where
        unmatched_facts.provider = 'stripe' and unmatched_facts.account = p_account
        and unmatched_facts.kind = 'money' and unmatched_facts.ended_as is distinct from 'matched'
        and unmatched_facts.fact -> 'data' ->> 'category' <> 'bank_line';
end;

comment on function surety.known_money(text) is
'All balance transactions of an account at the provider that we know of, with or without a payment. Amounts are minor
units of the currency.';

create or replace function surety.compare_money(p_account text)
returns table (
    line integer, id text, payment_id text, currency text, record_id text, is_known boolean, fields jsonb
)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        staged.line,
        staged.id,
        known.payment_id,
        staged.currency,
        known.record_id,
        known.id is not null,
        jsonb_path_query_array(
            jsonb_build_array(
                surety.differing_value('currency', known.currency, staged.currency),
                surety.differing_amount('gross', known.gross_minor, staged.gross_minor),
                surety.differing_amount('fee', known.fee_minor, staged.fee_minor),
                surety.differing_amount('net', known.net_minor, staged.net_minor),
                surety.differing_value(
                    'category',
                    -- A later line of a dispute is an adjustment in reports.
                    case
                        when staged.category = 'other_adjustment' and known.category in ('dispute', 'dispute_reversal')
                            then staged.category
                        else known.category
                    end,
                    staged.category
                ),
                -- A payout's balance transactions may not be read yet, and a report may be older than the payout.
                surety.differing_value(
                    'payout', coalesce(payout_lines.payout_id, staged.payout_id),
                    coalesce(staged.payout_id, payout_lines.payout_id)
                )
            ),
            '$[*] ? (@.here != @.there)'
        )
    from surety.staged_report_rows as staged
    left join surety.known_money(p_account) as known on staged.id = known.id
    left join surety.payout_lines
        on
            payout_lines.provider = 'stripe' and payout_lines.account = p_account
            and staged.id = payout_lines.line_id
    where
        known.id is null or known.currency <> staged.currency or known.gross_minor <> staged.gross_minor
        or known.fee_minor <> staged.fee_minor or known.net_minor <> staged.net_minor
        or known.category <> staged.category or payout_lines.payout_id <> staged.payout_id;
end;

comment on function surety.compare_money(text) is
'The staged rows of a balance or payout reconciliation report that differ from our records, with the fields that do; or
are not known here. Amounts are minor units.';

create or replace function surety.compare_payouts(p_account text)
returns table (line integer, id text, currency text, is_known boolean, fields jsonb)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        staged.line,
        staged.id,
        staged.currency,
        payouts.id is not null,
        jsonb_path_query_array(
            jsonb_build_array(
                surety.differing_value('currency', payouts.currency, staged.currency),
                -- A report has the change of the balance: a payout takes its amount off.
                surety.differing_amount('amount', abs(payouts.amount_minor), abs(staged.gross_minor)),
                surety.differing_value('status', payouts.status, coalesce(staged.status, payouts.status)),
                surety.differing_value(
                    'trace_id', coalesce(payouts.trace_id, staged.trace_id),
                    coalesce(staged.trace_id, payouts.trace_id)
                ),
                surety.differing_value(
                    'arrival_on', coalesce(payouts.arrival_on, staged.arrival_on)::text,
                    coalesce(staged.arrival_on, payouts.arrival_on)::text
                )
            ),
            '$[*] ? (@.here != @.there)'
        )
    from surety.staged_report_rows as staged
    left join surety.payouts
        on payouts.provider = 'stripe' and payouts.account = p_account and staged.id = payouts.id
    -- A failed payout has a second row, which gives its amount back.
    where staged.category = 'payout';
end;

comment on function surety.compare_payouts(text) is
'The staged rows of a payouts report with the fields that differ from our records, none if they are equal. Amounts are
minor units.';

create or replace function surety.absent_in_report(
    p_kind text, p_account text, p_from timestamptz, p_to timestamptz
) returns table (id text, payment_id text, currency text, net_minor bigint, record_id text)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        known.id,
        known.payment_id,
        known.currency,
        known.net_minor,
        known.record_id
    from surety.known_money(p_account) as known
    left join surety.staged_report_rows as staged on known.id = staged.id
    where
        p_kind = 'balance' and staged.id is null and known.created_at between p_from and p_to
        -- The report has no payouts, and may have been made for one currency.
        and known.category not in ('payout', 'payout_reversal')
        and known.currency in (select of_report.currency from surety.staged_report_rows as of_report)
    union all
    select
        payout_lines.line_id,
        provider_objects.payment_id,
        payout_lines.currency,
        payout_lines.net_minor,
        payout_lines.payout_id
    from surety.payout_lines
    left join surety.provider_objects
        on
            payout_lines.provider = provider_objects.provider and payout_lines.account = provider_objects.account
            and payout_lines.line_id = provider_objects.object_id
    left join surety.staged_report_rows as staged on payout_lines.line_id = staged.id
    where
        p_kind = 'payout_reconciliation' and staged.id is null and payout_lines.category <> 'payout'
        and payout_lines.provider = 'stripe' and payout_lines.account = p_account
        and payout_lines.payout_id in (
            select of_report.payout_id from surety.staged_report_rows as of_report where of_report.payout_id is not null
        )
    union all
    select
        payouts.id,
        null,
        payouts.currency,
        payouts.amount_minor,
        payouts.id
    from surety.payouts
    left join surety.staged_report_rows as staged on payouts.id = staged.id
    where
        p_kind = 'payouts' and staged.id is null and payouts.provider = 'stripe' and payouts.account = p_account
        and payouts.arrival_on between p_from::date and p_to::date
        and payouts.currency in (select of_report.currency from surety.staged_report_rows as of_report);
end;

comment on function surety.absent_in_report(text, text, timestamptz, timestamptz) is
'Our records that the staged report should have and has not: of a balance report all money of its time and currencies,
of a payout reconciliation report the balance transactions of its payouts, of a payouts report those that arrive then.';

create or replace function surety.compare_report(p_file jsonb, p_actor text) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The rows are staged by this transaction, so others don't see them. Discrepancies are opened in one order.
declare
    v_now timestamptz := surety.time_now();
    v_id text := surety.new_id('rpf', v_now);
    v_kind text := p_file ->> 'kind';
    v_account text := p_file ->> 'account';
    v_from timestamptz;
    v_to timestamptz;
    v_different integer := 0;
    v_missing integer := 0;
    v_absent integer := 0;
begin
    select coalesce((p_file ->> 'from')::timestamptz, min(r.at)), coalesce((p_file ->> 'to')::timestamptz, max(r.at))
    into v_from, v_to from surety.staged_report_rows as r;
    insert into surety.report_files (
        id, digest, name, kind, account, from_at, to_at, row_count, refused_count, difference_count,
        missing_here_count, missing_at_provider_count, imported_by, imported_at
    )
    values (
        v_id, p_file ->> 'digest', p_file ->> 'name', v_kind, v_account, v_from, v_to, 0, 0, 0, 0, 0, p_actor, v_now
    )
    on conflict (digest, account) do nothing;
    if not found then
        return null;
    end if;
    -- A row that repeats an id is refused; a failed payout has two.
    with repeated as (
        select r.line, r.id, r.first_line
        from (
            select s.line, s.id, min(s.line) over w as first_line, row_number() over w as n
            from surety.staged_report_rows as s
            window w as (partition by s.id, case when v_kind = 'payouts' then s.category end order by s.line)
        ) as r where r.n > 1
    ),
    dropped as (
        delete from surety.staged_report_rows as s using repeated as r where s.line = r.line returning r.*
    )
    insert into surety.staged_bank_refusals (place, field, value, rule, subject)
    select d.line, case v_kind when 'payouts' then 'payout_id' else 'balance_transaction_id' end, d.id,
        format('an id stands once; this one stands in line %s', d.first_line), d.id
    from dropped as d;
    insert into surety.refused_report_rows (file_id, line, field, value, rule)
    select v_id, r.place, r.field, r.value, r.rule from surety.staged_bank_refusals as r;

    if v_kind = 'payouts' then
        perform surety.close_discrepancies(k.kind, array_agg(d.id || ':report'), 'the report agrees', v_now)
        from surety.compare_payouts(v_account) as d
        cross join unnest(array['missing_here', 'state', 'amount', 'currency']) as k (kind)
        where d.is_known and d.fields = '[]'
        group by k.kind order by k.kind;
        select count(*) filter (where d.is_known), count(*) filter (where not d.is_known)
        into v_different, v_missing
        from (
            select d.*, surety.open_discrepancy(
                case
                    when not d.is_known then 'missing_here'
                    when d.fields @? '$[*] ? (@.field == "currency")' then 'currency'
                    when d.fields @? '$[*] ? (@.field == "amount")' then 'amount'
                    else 'state'
                end,
                d.id || ':report', 'critical',
                format('payout %s of line %s of %s %s', d.id, d.line, p_file ->> 'name',
                    case when d.is_known then 'differs' else 'is not known here' end),
                case when d.is_known then d.fields
                    else jsonb_build_array(surety.differing_value('payout', null, d.id)) end,
                case when d.is_known then d.id end, v_id || ':' || d.line, v_now, p_currency => d.currency)
            from surety.compare_payouts(v_account) as d
            where not d.is_known or d.fields <> '[]'
            order by d.id
        ) as d;
    else
        select count(*) filter (where d.is_known), count(*) filter (where not d.is_known)
        into v_different, v_missing
        from (
            select d.*, surety.open_discrepancy(
                case
                    when not d.is_known then 'missing_here'
                    when d.fields @? '$[*] ? (@.field == "currency")' then 'currency'
                    when d.fields @? '$[*] ? (@.field == "gross")' then 'amount'
                    when d.fields @? '$[*] ? (@.field == "fee")' then 'fee'
                    when d.fields @? '$[*] ? (@.field == "net")' then 'amount'
                    when d.fields @? '$[*] ? (@.field == "category")' then 'category'
                    else 'state'
                end,
                d.id || ':report', 'critical',
                format('%s of line %s of %s %s', d.id, d.line, p_file ->> 'name',
                    case when d.is_known then 'differs' else 'is not known here' end),
                case when d.is_known then d.fields
                    else jsonb_build_array(surety.differing_value('balance transaction', null, d.id)) end,
                d.record_id, v_id || ':' || d.line, v_now, p_payment_id => d.payment_id, p_currency => d.currency)
            from surety.compare_money(v_account) as d
            where not d.is_known or d.fields <> '[]'
            order by d.id
        ) as d;
        perform surety.close_discrepancies(d.kind, array_agg(d.subject), 'the report agrees', v_now)
        from surety.discrepancies as d
        join surety.staged_report_rows as s on d.subject = s.id || ':report'
        where d.closed_at is null and d.source_there not like v_id || ':%'
        group by d.kind;
    end if;
    select count(*)
    into v_absent
    from (
        select surety.open_discrepancy(
            'missing_at_provider', a.id || ':report', 'critical',
            format('%s is known here and not in %s', a.id, p_file ->> 'name'),
            jsonb_build_array(surety.differing_amount('net', a.net_minor, null)), a.record_id, v_id, v_now,
            p_payment_id => a.payment_id, p_currency => a.currency)
        from surety.absent_in_report(v_kind, v_account, v_from, v_to) as a
        -- A row that is refused is not absent.
        where not exists (select from surety.staged_bank_refusals as r where r.subject = a.id)
        order by a.id
    ) as opened;

    update surety.report_files
    set row_count = (select count(*) from surety.staged_report_rows),
        refused_count = (select count(*) from surety.staged_bank_refusals),
        difference_count = v_different, missing_here_count = v_missing, missing_at_provider_count = v_absent
    where id = v_id;
    delete from surety.staged_report_rows;
    delete from surety.staged_bank_refusals;
    perform audit.write_entry(
        'operator', 'operator:' || p_actor, 'report compared', null,
        p_snapshot => jsonb_build_object('file', v_id, 'kind', v_kind, 'differences', v_different));
    return (select to_jsonb(f) from surety.report_files as f cross join surety.await_standbys() where f.id = v_id);
end;
$$;

comment on function surety.compare_report(jsonb, text) is
'Compares the staged rows of a report of the provider with our records, stores its refused rows and audits it. Each
difference is a discrepancy, whose other side is file:line; one that the report does not show is closed. Returns the
file''s row; null if the same file was compared before.';
