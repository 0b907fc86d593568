-- Bank statements: files are staged, then stored at once; a line that comes twice is kept once.

create or replace function surety.bank_line_digest(p_line surety.staged_bank_lines) returns bytea
language sql stable parallel safe
begin atomic
    -- With a reference of the bank's, other texts don't matter: versions of a format write them differently.
    select substr(
        sha256(
            convert_to(
                concat_ws(
                    '|', p_line.booked_on - date '2000-01-01', p_line.amount_minor, p_line.currency,
                    p_line.part, p_line.bank_reference,
                    case
                        when p_line.bank_reference = ''
                            then array_to_string(p_line.reference_words, '|') || '|' || p_line.description
                    end
                ),
                'UTF8'
            )
        ),
        1, 16
    );
end;

comment on function surety.bank_line_digest(surety.staged_bank_lines) is
'Identifies the content of a line within its account. Lines with the same digest are alike.';

create or replace function surety.statements_overlap(
    p_account_id text, p_statement_id text, p_reference text, p_from date, p_to date, p_sequence bigint,
    p_opening bigint
) returns boolean
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- Pages of one statement share its days, and so do consecutive statements of one day; they have no line in common.
    select count(*) > 0
    from surety.bank_statements
    where
        bank_statements.account_id = p_account_id and bank_statements.id <> p_statement_id
        and bank_statements.reference <> p_reference
        and bank_statements.from_on <= p_to and bank_statements.to_on >= p_from
        and not coalesce(
            bank_statements.sequence <> p_sequence and bank_statements.closing_minor = p_opening, false
        );
end;

comment on function surety.statements_overlap(text, text, text, date, date, bigint, bigint) is
'Whether another statement of the account covers some of these days, so that lines may come in both. A statement with
another number that ends with the opening balance precedes this one.';

create or replace function surety.store_bank_statement(
    p_file_id text, p_number integer, p_head jsonb, p_at timestamptz, out account_id text, out new_lines integer
)
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.bank_accounts;
    v_statement surety.bank_statements;
    v_is_new boolean;
    v_may_repeat boolean;
begin
    insert into surety.bank_accounts as a (id, digest, hint, bank, currency, created_at)
    values (
        surety.new_id('bac', p_at), p_head ->> 'digest', p_head ->> 'hint', p_head ->> 'bank', p_head ->> 'currency',
        p_at
    )
    on conflict (digest, currency) do nothing;
    -- Two imports of one account wait for each other: both may bring the same lines.
    select a.* into v_account from surety.bank_accounts as a
    where a.digest = p_head ->> 'digest' and a.currency = p_head ->> 'currency'
    for update;
    account_id := v_account.id;

    with lines as (
        select count(*)::integer as n, coalesce(sum(l.amount_minor), 0)::bigint as minor, min(l.booked_on) as first_on,
            max(l.booked_on) as last_on
        from surety.staged_bank_lines as l where l.statement = p_number
    )
    insert into surety.bank_statements as s (
        id, account_id, file_id, reference, page, sequence, from_on, to_on, opening_minor, closing_minor, line_count,
        lines_minor, imported_at
    )
    select
        surety.new_id('bst', p_at), v_account.id, p_file_id, p_head ->> 'reference', (p_head ->> 'page')::integer,
        (p_head ->> 'sequence')::bigint, coalesce((p_head ->> 'from_on')::date, l.first_on),
        coalesce((p_head ->> 'to_on')::date, l.last_on), (p_head ->> 'opening_minor')::bigint,
        (p_head ->> 'closing_minor')::bigint, l.n, l.minor, p_at
    from lines as l
    on conflict on constraint bank_statement_is_kept_once do nothing
    returning s.* into v_statement;
    v_is_new := found;
    if not v_is_new then
        select s.* into v_statement from surety.bank_statements as s
        where s.account_id = v_account.id and s.reference = p_head ->> 'reference'
            and s.page is not distinct from (p_head ->> 'page')::integer
        order by s.imported_at desc limit 1;
    end if;
    v_may_repeat := not v_is_new or surety.statements_overlap(
        v_account.id, v_statement.id, v_statement.reference, v_statement.from_on, v_statement.to_on,
        v_statement.sequence, v_statement.opening_minor);

    with staged as (
        select l.*, d.digest, row_number() over (partition by d.digest order by l.place, l.part) as n
        from surety.staged_bank_lines as l
        cross join lateral surety.bank_line_digest(l) as d (digest)
        where l.statement = p_number
    ),
    stored as (
        insert into surety.bank_lines (
            id, account_id, statement_id, digest, ordinal, place, part, booked_on, value_on, amount_minor, currency,
            bank_reference, reference_words, description, code, is_reversal, state
        )
        select
            surety.new_id('bln', p_at), v_account.id, v_statement.id, l.digest,
            l.n + case when v_may_repeat then 0 else k.n end, l.place, l.part, l.booked_on, l.value_on, l.amount_minor,
            l.currency, l.bank_reference, l.reference_words, l.description, l.code, l.is_reversal, 'new'
        from staged as l
        cross join lateral (
            select count(*) as n from surety.bank_lines as k where k.account_id = v_account.id and k.digest = l.digest
        ) as k
        where not v_may_repeat or l.n > k.n
        returning 1
    )
    select count(*) into new_lines from stored;

    perform surety.open_discrepancy(
        'amount', v_statement.id || ':lines', 'critical',
        format('statement %s of the bank account …%s came again with %s other lines', v_statement.reference,
            v_account.hint, new_lines),
        jsonb_build_array(surety.differing_value('lines', null, new_lines || ' others in ' || p_file_id)),
        v_statement.id, p_file_id, p_at, p_currency => v_account.currency)
    where not v_is_new and new_lines > 0;
    perform surety.open_discrepancy(
        'amount', v_statement.id || ':balance', 'critical',
        format('statement %s of the bank account …%s begins with %s, its lines add up to %s, it ends with %s',
            v_statement.reference, v_account.hint,
            surety.format_amount(v_statement.opening_minor, v_account.currency),
            surety.format_amount(v_statement.lines_minor, v_account.currency),
            surety.format_amount(v_statement.closing_minor, v_account.currency)),
        jsonb_build_array(surety.differing_amount(
            'closing balance', v_statement.opening_minor + v_statement.lines_minor, v_statement.closing_minor)),
        v_statement.id, p_file_id, p_at, p_currency => v_account.currency)
    where v_is_new and v_statement.opening_minor + v_statement.lines_minor <> v_statement.closing_minor;
end;
$$;

comment on function surety.store_bank_statement(text, integer, jsonb, timestamptz) is
'Stores the p_number-th statement of a file that is staged, with the lines that are not known; returns its account and
their number. Balances that do not add up, and a statement that comes again with other lines, are critical
discrepancies.';

create or replace function surety.check_statement_sequence(p_account_id text, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_gap record;
    v_open text [] := '{}';
begin
    for v_gap in
        with ordered as (
            select
                s.*, a.hint, a.currency,
                lag(s.id) over w as before_id,
                lag(s.sequence) over w as sequence_before,
                lag(s.closing_minor) over w as closing_before,
                lag(s.to_on) over w as to_before
            from surety.bank_statements as s
            join surety.bank_accounts as a on a.id = s.account_id
            where s.account_id = p_account_id and s.page is null
            window w as (order by s.to_on, s.from_on, s.sequence, s.id)
        )
        select o.*, o.sequence > o.sequence_before + 1 as is_gap
        from ordered as o
        where o.sequence > o.sequence_before + 1
            -- Statements that overlap begin with an earlier balance.
            or (o.opening_minor <> o.closing_before and o.from_on > o.to_before)
    loop
        v_open := v_open || (v_gap.id || ':before');
        perform surety.open_discrepancy(
            'missing_here', v_gap.id || ':before', 'critical',
            case
                when v_gap.is_gap then format(
                    'of the bank account …%s, statements between number %s and %s are missing', v_gap.hint,
                    v_gap.sequence_before, v_gap.sequence)
                else format(
                    'statement %s of the bank account …%s begins with %s, the one before ended with %s',
                    v_gap.reference, v_gap.hint, surety.format_amount(v_gap.opening_minor, v_gap.currency),
                    surety.format_amount(v_gap.closing_before, v_gap.currency))
            end,
            jsonb_build_array(
                case
                    when v_gap.is_gap
                        then surety.differing_value('number before', v_gap.sequence_before::text,
                            (v_gap.sequence - 1)::text)
                    else surety.differing_amount('balance before', v_gap.closing_before, v_gap.opening_minor)
                end),
            v_gap.before_id, v_gap.id, p_at, p_currency => v_gap.currency);
    end loop;
    perform surety.close_discrepancies('missing_here', array_agg(d.subject), 'the statement is imported', p_at)
    from surety.discrepancies as d
    where d.kind = 'missing_here' and d.closed_at is null and not d.subject = any(v_open)
        and d.subject in (
            select s.id || ':before' from surety.bank_statements as s where s.account_id = p_account_id
        );
end;
$$;

comment on function surety.check_statement_sequence(text, timestamptz) is
'Opens a critical discrepancy where statements of an account are missing, by their numbers or balances, and closes those
that have arrived.';

create or replace function surety.import_bank_file(p_file jsonb, p_heads jsonb, p_actor text) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The lines and refusals are in the staging tables, put there by this transaction: others don't see them.
declare
    v_now timestamptz := surety.time_now();
    v_file_id text := surety.new_id('bfl', v_now);
    v_accounts text [] := '{}';
    v_new integer := 0;
    v_matched integer;
    v_head record;
    v_stored record;
begin
    insert into surety.bank_files (
        id, digest, name, format, statement_count, line_count, new_line_count, refused_count, skipped_count,
        imported_by, imported_at
    )
    values (
        v_file_id, p_file ->> 'digest', p_file ->> 'name', p_file ->> 'format', jsonb_array_length(p_heads),
        (select count(*) from surety.staged_bank_lines), 0, (select count(*) from surety.staged_bank_refusals),
        (p_file ->> 'skipped')::integer, p_actor, v_now
    )
    on conflict (digest) do nothing;
    if not found then
        return null;
    end if;
    -- Accounts are locked in one order by all imports.
    for v_head in
        select h.head, h.number::integer as number
        from jsonb_array_elements(p_heads) with ordinality as h (head, number)
        order by h.head ->> 'digest', h.head ->> 'currency', h.number
    loop
        v_stored := surety.store_bank_statement(v_file_id, v_head.number, v_head.head, v_now);
        v_accounts := v_accounts || v_stored.account_id;
        v_new := v_new + v_stored.new_lines;
    end loop;
    insert into surety.refused_bank_entries (file_id, place, field, value, rule)
    select v_file_id, r.place, r.field, r.value, r.rule from surety.staged_bank_refusals as r;
    update surety.bank_files set new_line_count = v_new where id = v_file_id;
    delete from surety.staged_bank_lines;
    delete from surety.staged_bank_refusals;
    perform surety.check_statement_sequence(a.id, v_now)
    from (select distinct i.id from unnest(v_accounts) as i (id) order by 1) as a;
    v_matched := surety.match_bank_lines();
    perform audit.write_entry(
        'operator', 'operator:' || p_actor, 'bank statements imported', null,
        p_snapshot => jsonb_build_object('file', v_file_id, 'lines', v_new, 'matched', v_matched));
    return (
        select to_jsonb(f) || jsonb_build_object(
            'matched', v_matched,
            'unmatched', (
                select count(*) from surety.bank_lines as l
                where l.state = 'unmatched' and l.statement_id in (
                    select s.id from surety.bank_statements as s where s.file_id = v_file_id
                )
            ))
        from surety.bank_files as f cross join surety.await_standbys() where f.id = v_file_id
    );
end;
$$;

comment on function surety.import_bank_file(jsonb, jsonb, text) is
'Stores the statements of a file whose lines and refused entries are staged, matches the lines to payouts and audits it.
Returns the file''s row with the numbers of matched and unmatched lines; null if the same file was imported before.';

create or replace function surety.set_csv_mapping(p_name text, p_columns jsonb, p_actor text) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.csv_mappings (name, columns, set_by, set_at)
    values (p_name, p_columns, p_actor, surety.time_now())
    on conflict (name) do update
    set columns = excluded.columns, set_by = excluded.set_by, set_at = excluded.set_at;

    select audit.write_entry(
        'operator', 'operator:' || p_actor, 'csv mapping set', null,
        p_snapshot => jsonb_build_object('name', p_name, 'columns', p_columns)
    );
end;

comment on function surety.set_csv_mapping(text, jsonb, text) is
'Sets a named mapping of the columns of a bank''s CSV files, and audits it.';

create or replace function surety.set_bank_account(
    p_id text, p_provider_account text, p_payer_text text, p_actor text
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.bank_accounts as a
    set provider_account = coalesce(p_provider_account, a.provider_account),
        payer_text = case when p_payer_text is null then a.payer_text else nullif(p_payer_text, '') end
    where a.id = p_id;
    if not found then
        return false;
    end if;
    -- Lines that are unmatched so far are looked at again by the new settings.
    update surety.bank_lines set state = 'new' where account_id = p_id and state in ('unmatched', 'other');
    perform surety.match_bank_lines();
    perform surety.close_discrepancies(
        'unmatched_cash', array_agg(d.subject), 'the line is not the provider''s', surety.time_now())
    from surety.bank_lines as l
    join surety.discrepancies as d on d.kind = 'unmatched_cash' and d.subject = l.id and d.closed_at is null
    where l.account_id = p_id and l.state = 'other';
    perform audit.write_entry(
        'operator', 'operator:' || p_actor, 'bank account set', null,
        p_snapshot => jsonb_build_object(
            'bank_account', p_id, 'provider_account', p_provider_account, 'payer_text', p_payer_text));
    return true;
end;
$$;

comment on function surety.set_bank_account(text, text, text, text) is
'Sets which account at the provider pays out to a bank account, and which words only the provider''s lines have (empty:
all lines are the provider''s); null keeps. Matches again. False if there is no such bank account.';
