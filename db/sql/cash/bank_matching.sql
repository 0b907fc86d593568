-- Matching of banks' lines to payouts: by trace id, then by amount and day, then one line to several payouts and
-- several lines to one payout. A matched line posts the ledger's bank leg. An unmatched one is a discrepancy.

create or replace function surety.banking_days_between(p_first date, p_second date) returns integer
language sql immutable parallel safe
begin atomic
    select count(*)::integer
    from generate_series(1, abs(p_second - p_first)) as passed (days)
    where extract(isodow from least(p_first, p_second) + passed.days) < 6;
end;

comment on function surety.banking_days_between(date, date) is
'The banking days from one day to another, in either direction. Saturdays and Sundays are none; holidays are counted.';

create or replace function surety.link_bank_line(
    p_line_id text, p_account text, p_payout_id text, p_amount_minor bigint, p_rule text, p_at timestamptz
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.bank_line_payouts (line_id, provider, account, payout_id, amount_minor, matched_by, matched_at)
    values (p_line_id, 'stripe', p_account, p_payout_id, p_amount_minor, p_rule, p_at);

    update surety.bank_lines
    set state = 'matched'
    where bank_lines.id = p_line_id;

    update surety.payouts
    set matched_minor = payouts.matched_minor + p_amount_minor
    where payouts.provider = 'stripe' and payouts.account = p_account and payouts.id = p_payout_id;
end;

comment on function surety.link_bank_line(text, text, text, bigint, text, timestamptz) is
'Notes that a bank''s line pays a payout, with an amount in minor units.';

create or replace function surety.payouts_near_bank_lines(p_days integer)
returns table (
    line_id text, line_minor bigint, booked_on date, account text, payout_id text, payout_minor bigint,
    arrival_on date, days integer
)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        bank_lines.id,
        bank_lines.amount_minor,
        bank_lines.booked_on,
        payouts.account,
        payouts.id,
        payouts.expected_minor - payouts.matched_minor,
        payouts.arrival_on,
        surety.banking_days_between(bank_lines.booked_on, payouts.arrival_on)
    from surety.payouts
    inner join surety.bank_accounts
        on payouts.account = bank_accounts.provider_account and payouts.currency = bank_accounts.currency
    inner join surety.bank_lines
        on
            bank_accounts.id = bank_lines.account_id and bank_lines.state in ('new', 'unmatched')
            -- At most so many calendar days are p_days banking days.
            and bank_lines.booked_on between payouts.arrival_on - (p_days + 4 + p_days / 5 * 2)
            and payouts.arrival_on + (p_days + 4 + p_days / 5 * 2)
            and sign(bank_lines.amount_minor) = sign(payouts.expected_minor - payouts.matched_minor)
    where
        payouts.expected_minor <> payouts.matched_minor and payouts.arrival_on is not null
        and surety.banking_days_between(bank_lines.booked_on, payouts.arrival_on) <= p_days;
end;

comment on function surety.payouts_near_bank_lines(integer) is
'Pairs of an unmatched line and a payout that the bank does not show yet, in one currency and direction, at most p_days
banking days apart. payout_minor is the part that is missing, in minor units.';

create or replace function surety.unique_sum(p_parts bigint[], p_total bigint) returns integer[]
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
-- Every subset of at most twelve parts.
declare
    v_count constant integer := cardinality(p_parts);
    v_found integer [];
    v_members integer [];
begin
    if v_count < 2 or v_count > 12 then
        return null;
    end if;
    for v_subset in 1 .. (1 << v_count) - 1 loop
        select array_agg(i) into v_members from generate_series(1, v_count) as i where v_subset & (1 << (i - 1)) <> 0;
        if cardinality(v_members) >= 2
            and (select sum(p_parts[i]) from unnest(v_members) as i) = p_total then
            if v_found is not null then
                return null;
            end if;
            v_found := v_members;
        end if;
    end loop;
    return v_found;
end;
$$;

comment on function surety.unique_sum(bigint[], bigint) is
'The places of the parts, two or more, that add up to a total in one way only; null if none do, or in several ways, or
if there are more than twelve parts.';

create or replace function surety.match_by_trace_id(p_at timestamptz) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_lines text [] := '{}';
    v_pair record;
begin
    for v_pair in
        with words as (
            select l.id as line_id, l.amount_minor, l.currency, a.provider_account, upper(w.word) as word
            from surety.bank_lines as l
            join surety.bank_accounts as a on a.id = l.account_id
            cross join lateral unnest(l.reference_words) as w (word)
            where l.state in ('new', 'unmatched') and length(w.word) >= 6
        ),
        names as (
            select p.account, p.id, p.currency, p.expected_minor - p.matched_minor as missing, n.word
            from surety.payouts as p
            cross join lateral (values (upper(p.trace_id)), (upper(p.id))) as n (word)
            where p.expected_minor <> p.matched_minor and n.word is not null
        ),
        pairs as (
            select distinct w.line_id, w.amount_minor, n.account, n.id as payout_id, n.missing
            from words as w
            join names as n on n.word = w.word and n.currency = w.currency and n.account = w.provider_account
        )
        select p.*, count(*) over (partition by p.line_id) as payouts from pairs as p order by p.line_id, p.payout_id
    loop
        perform surety.link_bank_line(
            v_pair.line_id, v_pair.account, v_pair.payout_id,
            case when v_pair.payouts = 1 then v_pair.amount_minor else v_pair.missing end, 'trace_id', p_at);
        v_lines := v_lines || v_pair.line_id;
    end loop;
    return v_lines;
end;
$$;

comment on function surety.match_by_trace_id(timestamptz) is
'Matches lines that name a payout''s trace id or id, whatever their amount and day. Returns the lines'' ids.';

create or replace function surety.match_by_amount(p_days integer, p_at timestamptz) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- The nearest pair first. Payouts of one amount are alike, so an earlier one gets the earlier line.
declare
    v_lines text [] := '{}';
    v_payouts text [] := '{}';
    v_pair record;
begin
    for v_pair in
        select n.* from surety.payouts_near_bank_lines(p_days) as n
        where n.line_minor = n.payout_minor
        order by n.days, n.arrival_on, n.booked_on, n.payout_id, n.line_id
    loop
        if v_pair.line_id = any(v_lines) or v_pair.account || '/' || v_pair.payout_id = any(v_payouts) then
            continue;
        end if;
        perform surety.link_bank_line(
            v_pair.line_id, v_pair.account, v_pair.payout_id, v_pair.line_minor, 'amount', p_at);
        v_lines := v_lines || v_pair.line_id;
        v_payouts := v_payouts || (v_pair.account || '/' || v_pair.payout_id);
    end loop;
    return v_lines;
end;
$$;

comment on function surety.match_by_amount(integer, timestamptz) is
'Matches lines and payouts of the same amount that are at most p_days banking days apart, the nearest first. Returns the
lines'' ids.';

create or replace function surety.match_sums(p_days integer, p_at timestamptz) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_lines text [] := '{}';
    v_group record;
    v_places integer [];
begin
    -- One line for several payouts.
    for v_group in
        select n.line_id, n.line_minor, n.account, array_agg(n.payout_id order by n.payout_id) as ids,
            array_agg(n.payout_minor order by n.payout_id) as parts
        from surety.payouts_near_bank_lines(p_days) as n
        where abs(n.payout_minor) < abs(n.line_minor)
        group by n.line_id, n.line_minor, n.account
        having count(*) between 2 and 12 and abs(sum(n.payout_minor)) >= abs(n.line_minor)
        order by n.line_id desc limit 500
    loop
        v_places := surety.unique_sum(v_group.parts, v_group.line_minor);
        if v_places is not null and not exists (
                select from unnest(v_places) as i
                join surety.payouts as p
                    on p.provider = 'stripe' and p.account = v_group.account and p.id = v_group.ids[i]
                where p.expected_minor = p.matched_minor
            ) then
            perform surety.link_bank_line(
                v_group.line_id, v_group.account, v_group.ids[i], v_group.parts[i], 'several_payouts', p_at)
            from unnest(v_places) as i;
            v_lines := v_lines || v_group.line_id;
        end if;
    end loop;
    -- Several lines for one payout.
    for v_group in
        select n.account, n.payout_id, n.payout_minor, array_agg(n.line_id order by n.line_id) as ids,
            array_agg(n.line_minor order by n.line_id) as parts
        from surety.payouts_near_bank_lines(p_days) as n
        where abs(n.line_minor) < abs(n.payout_minor)
        group by n.account, n.payout_id, n.payout_minor
        having count(*) between 2 and 12 and abs(sum(n.line_minor)) >= abs(n.payout_minor)
        order by n.account, n.payout_id desc limit 500
    loop
        v_places := surety.unique_sum(v_group.parts, v_group.payout_minor);
        if v_places is not null
            and not exists (select from unnest(v_places) as i where v_group.ids[i] = any(v_lines)) then
            perform surety.link_bank_line(
                v_group.ids[i], v_group.account, v_group.payout_id, v_group.parts[i], 'several_lines', p_at)
            from unnest(v_places) as i;
            v_lines := v_lines || array(select v_group.ids[i] from unnest(v_places) as i);
        end if;
    end loop;
    return v_lines;
end;
$$;

comment on function surety.match_sums(integer, timestamptz) is
'Matches a line to payouts that add up to it, and a payout to lines that add up to it, where there is one way only; the
newest 500 of each at a time. Returns the lines'' ids.';

create or replace function surety.open_unmatched_cash(p_days integer, p_at timestamptz) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_count integer;
begin
    with reported as (
        update surety.bank_lines as l
        set state = case
                when a.payer_text is null then 'unmatched'
                when position(upper(a.payer_text) in upper(concat_ws(' ', l.description, l.bank_reference,
                    array_to_string(l.reference_words, ' ')))) > 0 then 'unmatched'
                else 'other'
            end
        from surety.bank_accounts as a
        where a.id = l.account_id and l.state = 'new'
        returning l.*, a.hint
    )
    select count(surety.open_discrepancy(
        'unmatched_cash', r.id, 'warning',
        format('%s, booked on %s at the bank account …%s, belongs to no payout: %s',
            surety.format_amount(r.amount_minor, r.currency), r.booked_on, r.hint, r.description),
        jsonb_build_array(surety.differing_amount('amount', null, r.amount_minor)), null, r.id, p_at,
        p_currency => r.currency))
    into v_count
    from reported as r where r.state = 'unmatched';

    -- A payout is missing at the bank once statements cover its days, or should do so.
    v_count := v_count + (
        select count(surety.open_discrepancy(
            'unmatched_cash', p.id, 'critical',
            format('payout %s should be %s at the bank, arriving on %s; the bank shows %s', p.id,
                surety.format_amount(p.expected_minor, p.currency), p.arrival_on,
                surety.format_amount(p.matched_minor, p.currency)),
            jsonb_build_array(surety.differing_amount('amount', p.expected_minor, p.matched_minor)), p.id, (
                select min(m.line_id) from surety.bank_line_payouts as m
                where m.provider = p.provider and m.account = p.account and m.payout_id = p.id
            ), p_at, p_currency => p.currency))
        from surety.payouts as p
        where p.expected_minor <> p.matched_minor
            and exists (
                select from surety.bank_accounts as a
                left join surety.bank_statements as s on s.account_id = a.id
                where a.provider_account = p.account and a.currency = p.currency
                group by a.id
                having surety.banking_days_between(p.arrival_on, max(s.to_on)) > p_days and max(s.to_on) > p.arrival_on
                    or surety.banking_days_between(p.arrival_on, p_at::date) > p_days + 5 and p_at::date > p.arrival_on
                    or p.matched_minor <> 0
            )
    );
    return v_count;
end;
$$;

comment on function surety.open_unmatched_cash(integer, timestamptz) is
'Opens a discrepancy for each line that belongs to no payout, and for each payout that the bank does not show p_days
banking days after its arrival, or shows with another amount. Returns their number. A payout in a currency or of an
account without a bank account here is not expected.';

create or replace function surety.match_bank_lines(p_days integer default 3) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_lines text [] := '{}';
begin
    if not exists (select from surety.bank_accounts) then
        return 0;
    end if;
    -- One at a time: two imports may bring the line of one payout each.
    perform pg_advisory_xact_lock(hashtextextended('surety:match_bank_lines', 0));
    perform from surety.payouts as p where p.expected_minor <> p.matched_minor
    order by p.provider, p.account, p.id for update;
    if exists (
        select from surety.payouts as p
        join surety.bank_accounts as a on a.provider_account = p.account and a.currency = p.currency
        where p.expected_minor <> p.matched_minor
    ) then
        v_lines := surety.match_by_trace_id(v_now);
        v_lines := v_lines || surety.match_by_amount(p_days, v_now);
        v_lines := v_lines || surety.match_sums(p_days, v_now);
    end if;
    if cardinality(v_lines) > 0 then
        perform surety.store_unmatched_facts(jsonb_agg(jsonb_build_object(
            'provider', 'stripe', 'account', a.provider_account, 'livemode', e.livemode, 'object_id', l.id,
            'kind', 'money', 'amount_minor', l.amount_minor, 'currency', l.currency, 'source', 'file',
            'source_id', l.statement_id, 'occurred_at', l.booked_on,
            'data', jsonb_build_object('category', 'bank_line', 'fee', 0, 'net', l.amount_minor)
        ) order by l.id), v_now)
        from surety.bank_lines as l
        join surety.bank_accounts as a on a.id = l.account_id
        cross join surety.environment as e
        where l.id = any(v_lines);
    end if;
    perform surety.close_discrepancies('unmatched_cash', array_agg(d.subject), 'it is matched', v_now)
    from surety.discrepancies as d
    where d.kind = 'unmatched_cash' and d.closed_at is null
        and (
            exists (select from surety.bank_lines as l where l.id = d.subject and l.state = 'matched')
            or exists (
                select from surety.payouts as p where p.id = d.subject and p.expected_minor = p.matched_minor
            )
        );
    perform surety.open_unmatched_cash(p_days, v_now);
    return cardinality(v_lines);
end;
$$;

comment on function surety.match_bank_lines(integer) is
'Matches banks'' lines to payouts that are at most p_days banking days apart, posts the matched lines, opens
discrepancies for the rest and closes those that are matched. Returns the number of matched lines.';
