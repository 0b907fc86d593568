-- Closing months: balances of all accounts at the end of a month, kept for ever, with the matters that were open then.

create or replace function ledger.month_end(p_month date) returns timestamptz
language sql immutable parallel safe
begin atomic
    select (p_month + interval '1 month') at time zone 'UTC';
end;

comment on function ledger.month_end(date) is
'The beginning of the month after p_month, in UTC.';

create or replace function ledger.next_month_to_close() returns date
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        coalesce(
            (
                select (closed_months.month + interval '1 month')::date
                from ledger.closed_months
                order by closed_months.month desc
                limit 1
            ),
            (
                select date_trunc('month', postings.at at time zone 'UTC')::date
                from ledger.postings
                order by postings.id
                limit 1
            )
        );
end;

comment on function ledger.next_month_to_close() is
'The first day of the month after the last closed one; before any was closed that of the first posting. Null without
postings.';

create or replace function ledger.list_open_matters(p_before timestamptz)
returns table (kind text, count bigint, example text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        'discrepancies' as kind,
        count(*) as count,
        min(discrepancies.id) as example
    from surety.discrepancies
    where discrepancies.closed_at is null and discrepancies.opened_at < p_before
    having count(*) > 0
    union all
    select
        'payments_not_settled',
        count(*),
        min(expectations.payment_id)
    from surety.expectations
    where
        expectations.kind = 'settlement' and expectations.met_at is null and expectations.opened_at < p_before
    having count(*) > 0
    union all
    select
        'refunds_under_way',
        count(*),
        min(refunds.id)
    from surety.refunds
    where refunds.state in ('pending', 'requires_action') and refunds.created_at < p_before
    having count(*) > 0
    union all
    select
        'dead_letters',
        count(*),
        min(dead_letters.id)
    from outbox.dead_letters
    where dead_letters.closed_at is null and dead_letters.died_at < p_before
    having count(*) > 0
    union all
    select
        case when held.kind = 'disputed' then 'amounts_in_dispute' else 'amounts_in_suspense' end,
        count(*),
        min(held.account_id)
    from ledger.balances_at(p_before) as held
    where held.kind in ('disputed', 'suspense') and held.balance_minor <> 0
    group by held.kind
    union all
    select
        'negative_balances',
        count(*),
        min(owed.account_id)
    from ledger.balances_at(p_before) as owed
    where owed.kind = 'available' and owed.balance_minor < 0
    having count(*) > 0;
end;

comment on function ledger.list_open_matters(timestamptz) is
'What began before p_before and is open now: how many of each kind, with the id of one. Amounts in dispute or suspense
and negative balances are counted by account, as of p_before.';

create or replace function ledger.close_month(p_month date, p_actor text)
returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_final ledger.final_postings;
    v_end timestamptz := ledger.month_end(p_month);
    v_next date;
    v_findings jsonb;
    v_unbalanced text;
begin
    select f.* into v_final from ledger.final_postings as f for update;
    if exists (select from ledger.closed_months as c where c.month = p_month) then
        perform surety.await_standbys();
        return query select 'closed_before', null::text;
        return;
    end if;
    v_next := ledger.next_month_to_close();
    if v_end > surety.time_now() then
        return query select 'not_over', surety.format_time(v_end);
        return;
    elsif v_next is null then
        return query select 'no_postings', null::text;
        return;
    elsif p_month <> v_next then
        return query select 'out_of_order', to_char(v_next, 'YYYY-MM');
        return;
    elsif v_final.summed_to < v_end then
        return query select 'not_final', surety.format_time(v_final.summed_to);
        return;
    end if;
    select string_agg(u.currency, ', ') into v_unbalanced
    from (select b.currency from ledger.balances_at(v_end) as b group by 1 having sum(b.balance_minor) <> 0) as u;
    if v_unbalanced is not null then
        return query select 'unbalanced', v_unbalanced;
        return;
    end if;
    select coalesce(jsonb_object_agg(o.kind, jsonb_build_object('count', o.count, 'example', o.example)), '{}')
    into v_findings
    from ledger.list_open_matters(v_end) as o;
    insert into ledger.closed_months (month, closed_at, closed_by, findings)
    values (p_month, surety.time_now(), p_actor, v_findings);
    insert into ledger.closed_balances (month, account_id, balance_minor)
    select p_month, b.account_id, b.balance_minor from ledger.balances_at(v_end) as b;
    perform surety.audit_operator_action(
        p_actor, null, 'month closed',
        jsonb_build_object('month', to_char(p_month, 'YYYY-MM'), 'findings', v_findings));
    return query select 'closed', null::text;
end;
$$;

comment on function ledger.close_month(date, text) is
'Closes the books of a month that is over, final and summed: keeps the balance of each account and counts open matters.
outcome: closed, closed_before (nothing changes), or a refusal: not_over (detail: its end), no_postings, out_of_order
(the month that comes first), not_final (up to when days are summed), unbalanced (the currencies).';
