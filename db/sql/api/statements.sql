-- A merchant's statement of a month.

create or replace function api.get_statement(
    p_key_hash bytea, p_month date, p_limit integer, p_starting_after text, p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
    v_now timestamptz := surety.read_clock();
    v_from timestamptz := p_month::timestamp at time zone 'UTC';
    v_to timestamptz := least(ledger.month_end(p_month), v_now);
    v_closed_at timestamptz := (select c.closed_at from ledger.closed_months as c where c.month = p_month);
    v_lines json;
    v_has_more boolean;
begin
    if v_merchant is null then
        return;
    elsif v_from > v_now then
        return query select v_merchant, null::text;
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from ledger.postings as g where g.id = p_starting_after and g.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
    end if;
    with page as (
        select l.*, dense_rank() over (order by l.posting_id) as place
        from ledger.statement_lines(v_merchant, v_from, v_to, coalesce(p_starting_after, ''), p_limit + 1) as l
    )
    select
        coalesce(json_agg(json_build_object(
            'id', p.posting_id, 'object', 'statement_line', 'type', p.rule, 'payment', p.payment_id,
            'reference', p.reference, 'currency', p.currency, 'gross', p.gross_minor, 'fee', p.fee_minor,
            'net', p.net_minor, 'changes', (
                select json_agg(json_build_object(
                    'account', c.key, 'amount', c.value::bigint, 'currency', p.currency) order by c.key)
                from jsonb_each_text(p.changes) as c
            ),
            'booked_at', surety.format_time(p.booked_at), 'recorded_at', surety.format_time(p.recorded_at),
            'adjusts', case when p.recorded_at < v_from then to_char(p.recorded_at at time zone 'UTC', 'YYYY-MM') end
        ) order by p.posting_id, p.currency) filter (where p.place <= p_limit), '[]'),
        coalesce(max(p.place) > p_limit, false)
    into v_lines, v_has_more
    from page as p;
    return query
    select v_merchant, json_build_object(
        'object', 'statement',
        'month', to_char(p_month, 'YYYY-MM'),
        'status', case
            when v_closed_at is not null then 'closed' when v_now >= ledger.month_end(p_month) then 'over'
            else 'under_way'
        end,
        'starts_at', surety.format_time(v_from),
        'ends_at', surety.format_time(v_to),
        'closed_at', surety.format_time(v_closed_at),
        'balances', (
            select coalesce(json_agg(json_build_object(
                'currency', b.currency, 'account', b.kind, 'opening', b.opening_minor, 'closing', b.closing_minor
            ) order by b.currency, b.kind), '[]')
            from ledger.statement_balances(v_merchant, v_from, v_to) as b
        ),
        'data', v_lines,
        'has_more', v_has_more)::text;
end;
$$;

comment on function api.get_statement(bytea, date, integer, text, text) is
'The statement of a month that has begun: the merchant''s balances at its beginning and end, and a page of lines in the
order of booking. p_limit counts postings; one that moves two currencies has two lines. p_starting_after: the last id of
the page before. body is null for a month that has not begun. No row: the key may not read.';
